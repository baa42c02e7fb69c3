"""Ids of repeated cells: each cell reads the newest map of each level of the one before."""

from edet.fused.cells import Graph, Node, graph_of


def test_one_cell_is_itself():
    cell = [Node(0, (0, 1)), Node(1, (1, 2))]
    assert graph_of([cell], 2) == Graph(cell, [2, 3])


def test_ids_of_a_second_cell():
    cell = [Node(0, (0, 1)), Node(1, (1, 2))]
    graph = graph_of([cell, cell], 2)
    assert graph.edges == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [node.level for node in graph.nodes] == [0, 1, 0, 1]
    assert graph.outputs == [4, 5]


def test_the_newest_node_of_a_level_is_its_output():
    first = [Node(1, (1,)), Node(0, (0, 2)), Node(1, (2, 3))]
    graph = graph_of([first, [Node(0, (0, 1)), Node(1, (1,))]], 2)
    assert graph.edges[3:] == [(3, 4), (4,)]  # level 0 is node 3, level 1 node 4, not node 2
    assert graph.outputs == [5, 6]


def test_no_cell_gives_the_inputs_back():
    assert graph_of([], 3) == Graph([], [0, 1, 2])

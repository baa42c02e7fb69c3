// How a graph of fusion nodes is cut into tiles that one launch computes: in which order blocks
// claim them and what each waits for. The kernel and whoever prints or checks a schedule ask the
// same functions; nothing is stored for a tile.
#pragma once

#include "params.h"

namespace edet {

// What fits into a kernel's parameters (4 KiB) beside the maps' and weights' addresses: the eight
// cells of D7x are 80 nodes with 192 edges.
constexpr int kMostNodes = 80, kMostInputs = 16, kMostMaps = kMostInputs + kMostNodes;
constexpr int kMostGraphEdges = 192;

constexpr int kTileColumns = 8;  // of pixels

// One input of a node. Output o of a max pool reads inputs [o·stride − before, … + stride + 1).
struct GraphEdge {
  uint8_t source;  // a map: inputs come first, then nodes
  uint8_t stride_y, before_y, stride_x, before_x;
};

// A graph in claim order: nodes come after what they read, a node's tiles image by image and row by
// row, the slices of a tile (parts of its output channels) side by side.
struct TileGraph {
  int inputs, nodes, batch, tile_rows;
  uint16_t h[kMostMaps], w[kMostMaps];
  int first_tile[kMostNodes + 1];  // of each node; the last one is the number of tiles
  uint16_t first_edge[kMostNodes + 1];
  uint8_t slices[kMostNodes];
  GraphEdge edge[kMostGraphEdges];
};

struct GraphTile {
  int node, image, row, column, slice;
};

// Tiles [row0, row1) × [column0, column1) of one image of a node.
struct TileRange {
  int node, image, row0, row1, column0, column1;
};

EDET_EVERYWHERE inline int tiles_down(const TileGraph& g, int node) {
  return divide_up(g.h[g.inputs + node], g.tile_rows);
}
EDET_EVERYWHERE inline int tiles_across(const TileGraph& g, int node) {
  return divide_up(g.w[g.inputs + node], kTileColumns);
}

// The tile of a number; `node` is one whose first tile is not after it.
EDET_EVERYWHERE inline GraphTile tile_at(const TileGraph& g, int number, int node = 0) {
  while (number >= g.first_tile[node + 1]) node++;
  const int slices = g.slices[node], across = tiles_across(g, node), down = tiles_down(g, node);
  const int local = (number - g.first_tile[node]) / slices;
  return {node, local / (across * down), local / across % down, local % across,
          (number - g.first_tile[node]) % slices};
}

// The counter that says how many slices of a tile are done: the number of the tile's first slice.
EDET_EVERYWHERE inline int flag_of(const TileGraph& g, int node, int image, int row, int column) {
  return g.first_tile[node] +
         ((image * tiles_down(g, node) + row) * tiles_across(g, node) + column) * g.slices[node];
}

struct Span {
  int begin, end;
};

// Positions of a source of `in` that positions [begin, end) of `out`, and one more on either side
// for the depthwise convolution, read along one axis.
EDET_EVERYWHERE inline Span positions_read(int begin, int end, int in, int out, bool pooled,
                                           int stride, int before) {
  begin = begin > 0 ? begin - 1 : 0;
  end = end < out ? end + 1 : out;
  if (pooled) {
    begin = begin * stride - before;
    end = (end - 1) * stride - before + stride + 1;
  } else {  // nearest; the same position where in is out
    begin = static_cast<int>(static_cast<uint32_t>(begin) * static_cast<uint32_t>(in) /
                             static_cast<uint32_t>(out));
    end = static_cast<int>(static_cast<uint32_t>(end - 1) * static_cast<uint32_t>(in) /
                           static_cast<uint32_t>(out)) +
          1;
  }
  return {begin > 0 ? begin : 0, end < in ? end : in};
}

// Whether an edge shrinks its map to the node's size.
EDET_EVERYWHERE inline bool is_pooled(const TileGraph& g, int node, const GraphEdge& edge) {
  return g.h[edge.source] > g.h[g.inputs + node] || g.w[edge.source] > g.w[g.inputs + node];
}

// The tiles that a tile needs through the node's edge e, a number from first_edge on, whose source
// is a node.
EDET_EVERYWHERE inline TileRange tiles_read(const TileGraph& g, const GraphTile& tile, int e) {
  const GraphEdge& edge = g.edge[e];
  const int map = g.inputs + tile.node, source = edge.source;
  const bool pooled = is_pooled(g, tile.node, edge);
  const int y = tile.row * g.tile_rows, x = tile.column * kTileColumns;
  const Span rows = positions_read(y, y + g.tile_rows, g.h[source], g.h[map], pooled, edge.stride_y,
                                   edge.before_y);
  const Span columns = positions_read(x, x + kTileColumns, g.w[source], g.w[map], pooled,
                                      edge.stride_x, edge.before_x);
  return {source - g.inputs,
          tile.image,
          rows.begin / g.tile_rows,
          divide_up(rows.end, g.tile_rows),
          columns.begin / kTileColumns,
          divide_up(columns.end, kTileColumns)};
}

// ---- host ----

// An empty graph of tiles of tile_rows × kTileColumns pixels.
TileGraph empty_graph(int64_t batch, int tile_rows);
// Adds an input, before any node; false where the graph cannot hold it.
bool add_input(TileGraph& g, int64_t h, int64_t w);
// Adds a node that fuses maps `sources` and whose tiles are cut into slices; false, and the graph
// is as before, where it cannot hold it.
bool add_node(TileGraph& g, int64_t h, int64_t w, const int* sources, int edges, Pool pool,
              int64_t slices);

}  // namespace edet

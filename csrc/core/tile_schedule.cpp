// Builds graphs of tiles, and lists their schedules for edet_kernels/schedule.py.
#include "tile_schedule.h"

namespace edet {

namespace {

constexpr int64_t kMostSide = 65535;
constexpr int64_t kMostStride = 255;

}  // namespace

TileGraph empty_graph(int64_t batch, int tile_rows) {
  TileGraph g{};
  g.batch = static_cast<int>(batch);
  g.tile_rows = tile_rows;
  return g;
}

bool add_input(TileGraph& g, int64_t h, int64_t w) {
  if (g.inputs == kMostInputs || h > kMostSide || w > kMostSide) return false;
  g.h[g.inputs] = static_cast<uint16_t>(h);
  g.w[g.inputs] = static_cast<uint16_t>(w);
  g.inputs++;
  return true;
}

bool add_node(TileGraph& g, int64_t h, int64_t w, const int* sources, int edges, Pool pool,
              int64_t slices) {
  const int map = g.inputs + g.nodes, first = g.first_edge[g.nodes];
  if (g.nodes == kMostNodes || first + edges > kMostGraphEdges || h > kMostSide || w > kMostSide ||
      slices > UINT8_MAX)
    return false;
  for (int e = 0; e < edges; e++) {
    const int source = sources[e];
    const Window rows = pool_window(g.h[source], h, pool);
    const Window columns = pool_window(g.w[source], w, pool);
    if (rows.stride > kMostStride || columns.stride > kMostStride) return false;
    g.edge[first + e] = {static_cast<uint8_t>(source), static_cast<uint8_t>(rows.stride),
                         static_cast<uint8_t>(rows.before), static_cast<uint8_t>(columns.stride),
                         static_cast<uint8_t>(columns.before)};
  }
  const int64_t tiles = g.batch * divide_up(h, g.tile_rows) * divide_up(w, kTileColumns) * slices;
  if (tiles > INT32_MAX - g.first_tile[g.nodes]) return false;
  g.h[map] = static_cast<uint16_t>(h);
  g.w[map] = static_cast<uint16_t>(w);
  g.slices[g.nodes] = static_cast<uint8_t>(slices);
  g.first_tile[g.nodes + 1] = g.first_tile[g.nodes] + static_cast<int>(tiles);
  g.first_edge[g.nodes + 1] = static_cast<uint16_t>(first + edges);
  g.nodes++;
  return true;
}

}  // namespace edet

// Lists the schedule of a graph: for each tile in claim order its node, image, row, column, slice
// and flag; for each range of flags that it waits for its number, the source node, rows [r0, r1),
// columns [c0, c1) and the value to wait for. Either list may be null; returns their lengths, or −1
// where one launch cannot hold the graph.
extern "C" __attribute__((visibility("default"))) int64_t
edet_tile_schedule(int inputs, const int* input_sizes, int nodes, const int* sizes,
                   const int* edge_counts, const int* edges, const int* slices, int batch, int pool,
                   int tile_rows, int* tiles, int* waits, int64_t* wait_count) {
  using namespace edet;
  TileGraph g = empty_graph(batch, tile_rows);
  for (int i = 0; i < inputs; i++)
    if (!add_input(g, input_sizes[2 * i], input_sizes[2 * i + 1])) return -1;
  for (int i = 0; i < nodes; edges += edge_counts[i++])
    if (!add_node(g, sizes[2 * i], sizes[2 * i + 1], edges, edge_counts[i], static_cast<Pool>(pool),
                  slices[i]))
      return -1;
  const int count = g.first_tile[g.nodes];
  *wait_count = 0;
  for (int number = 0, node = 0; number < count; number++) {
    const GraphTile t = tile_at(g, number, node);
    node = t.node;
    if (tiles) {
      const int row[6] = {t.node,   t.image, t.row,
                          t.column, t.slice, flag_of(g, t.node, t.image, t.row, t.column)};
      for (int value : row) *tiles++ = value;
    }
    for (int e = g.first_edge[node]; e < g.first_edge[node + 1]; e++) {
      if (g.edge[e].source < g.inputs) continue;
      const TileRange r = tiles_read(g, t, e);
      if (waits) {
        const int row[7] = {number, r.node, r.row0, r.row1, r.column0, r.column1, g.slices[r.node]};
        for (int value : row) *waits++ = value;
      }
      (*wait_count)++;
    }
  }
  return count;
}

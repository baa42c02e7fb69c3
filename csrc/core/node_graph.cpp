// The memory of node_graph.h.
#include "node_graph.h"

#include <algorithm>

namespace edet {

std::vector<int64_t> place_maps(NodeGraph& graph, const std::vector<bool>& is_output, bool reuse,
                                int64_t* bytes) {
  const size_t count = graph.nodes.size();
  std::vector<std::vector<int>> readers(count);
  for (size_t i = 0; i < count; i++) {
    const FusionParams& fusion = graph.nodes[i].fusion;
    for (int e = 0; e < fusion.edges; e++)
      if (fusion.edge[e].source >= 0)
        readers[static_cast<size_t>(fusion.edge[e].source)].push_back(static_cast<int>(i));
  }
  struct Part {
    int64_t offset, bytes;
    int owner, last_use;  // nodes: who wrote it last, and who reads that last
  };
  std::vector<Part> parts;
  std::vector<int64_t> offsets(count, 0);
  graph.after.assign(count, {});
  for (size_t i = 0; i < count; i++) {
    if (is_output[i]) continue;
    const NodeParams& node = graph.nodes[i];
    const FusionParams& fusion = node.fusion;
    const int64_t element = graph.bytes ? 1 : fusion.dtype == DType::f32 ? 4 : 2;
    const int64_t size = fusion.n * fusion.h * fusion.w * node.c_out * element;
    const int me = static_cast<int>(i);
    Part* place = nullptr;  // the one that has been free for longest: nobody waits for it
    for (Part& part : parts)
      if (reuse && part.bytes == size && part.last_use < me &&
          (!place || part.last_use < place->last_use))
        place = &part;
    if (place) {
      graph.after[i] = readers[static_cast<size_t>(place->owner)];
      graph.after[i].push_back(place->owner);
    } else {
      parts.push_back({*bytes, size, 0, 0});
      *bytes += round_up(size, 64);
      place = &parts.back();
    }
    place->owner = me;
    place->last_use = readers[i].empty() ? me : readers[i].back();
    offsets[i] = place->offset;
  }
  return offsets;
}

}  // namespace edet

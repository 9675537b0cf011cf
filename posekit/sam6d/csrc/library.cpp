// The schemas; each kernel is in a file of its own name.

#include <torch/library.h>

TORCH_LIBRARY(sam6d, m) {
  m.def("embed(Tensor distance, Tensor angle, Tensor distances, Tensor angles, float steps, float step) -> Tensor");
  m.def("relative_attention(Tensor q, Tensor k, Tensor v, Tensor folded, Tensor structure) -> Tensor");
  m.def("focus(Tensor x, Tensor scale) -> Tensor");
  m.def("look_around(Tensor there, Tensor here, Tensor index, Tensor[] layers) -> Tensor");
  m.def("propose(Tensor pairs, Tensor scene, Tensor model) -> (Tensor, Tensor, Tensor)");
  m.def("surface_distance(Tensor scene, Tensor R, Tensor t, Tensor surface, Tensor wanted) -> Tensor");
  m.def("soft_matches(Tensor logits, Tensor model) -> (Tensor, Tensor, Tensor)");
}

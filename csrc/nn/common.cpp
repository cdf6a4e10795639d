#include "nn/common.h"

#include <torch/nn/init.h>

#include <cmath>
#include <sstream>

namespace torch_selfattn::nn {

using torch::Tensor;

void check_score(const char* module, const std::string& score) {
  TORCH_CHECK_VALUE(score == "dot" || score == "additive", module,
                    ": score must be 'dot' or 'additive' (got score='", score, "')");
}

void check_dropout(const char* module, double dropout) {
  TORCH_CHECK_VALUE(0.0 <= dropout && dropout <= 1.0, module,
                    ": dropout must be between 0 and 1 (got dropout=", dropout, ")");
}

void init_score_weight(Tensor& score_weight) {
  const double bound = 1 / std::sqrt(static_cast<double>(score_weight.size(-1)));
  torch::nn::init::uniform_(score_weight, -bound, bound);
}

std::string shape(torch::IntArrayRef sizes) {
  std::ostringstream stream;
  stream << "torch.Size(" << sizes << ')';
  return stream.str();
}

}  // namespace torch_selfattn::nn

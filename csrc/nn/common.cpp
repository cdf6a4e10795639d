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

void check_activation(const char* module, const std::string& score, const std::string& activation) {
  TORCH_CHECK_VALUE(activation == "tanh" || activation == "leaky_relu" || activation == "relu",
                    module, ": activation must be 'tanh', 'leaky_relu' or 'relu' (got activation='",
                    activation, "')");
  TORCH_CHECK_VALUE(score == "additive" || activation == "tanh", module,
                    ": activation belongs to the additive score (got score='", score,
                    "', activation='", activation, "')");
}

std::string activation_text(const std::string& activation, double negative_slope) {
  if (activation == "tanh") return "";
  std::ostringstream text;
  text << ", activation='" << activation << '\'';
  if (activation == "leaky_relu") text << ", negative_slope=" << negative_slope;
  return text.str();
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

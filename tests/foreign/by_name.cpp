// Reaches an operator by its name only: nothing here refers to a symbol of the library.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_selfattn/version.h>

int main() {
  return c10::Dispatcher::singleton()
                 .findSchema({"torch_selfattn::additive_attention", ""})
                 .has_value()
             ? 0
             : 1;
}

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace torch_selfattn::ops {

// The dispatcher's typed handle of an operator of this package; keep it in a static.
template <typename Function>
c10::TypedOperatorHandle<Function> operator_handle(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("torch_selfattn::") + name).c_str(), "")
      .typed<Function>();
}

}  // namespace torch_selfattn::ops

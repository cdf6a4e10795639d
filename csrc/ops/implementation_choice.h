#pragma once

#include <torch_selfattn/export.h>

#include <string>
#include <vector>

#include "kernels/common/attention_problem.h"

// The ordered list of implementations that each device has for an operator, best first: the first
// one that does not refuse the problem, and is not known to be slower than a later one, runs. A
// user can force one by name.
namespace torch_selfattn::ops {

// One line of explain(): why an implementation refuses, and why it is passed over if nobody forces
// it; empty if it does not, or is not.
struct Candidate {
  std::string name;
  std::string reason;
  std::string passed_over = {};
};

// The name that every attention call of the process must use; empty: the best one.
TORCH_SELFATTN_API std::string forced_implementation();
// Whether that is `name`: for implementations that run by name only. Allocates nothing.
TORCH_SELFATTN_API bool is_forced_implementation(const char* name);
// Sets it and returns the one before.
TORCH_SELFATTN_API std::string set_forced_implementation(std::string name);

// The index of the candidate to run. Raises the reason if the forced one refuses, ValueError if
// there is none of its name; prints the choice if TORCH_SELFATTN_VERBOSE contains "dispatch".
// `call` describes the problem, e.g. "dot_product_attention forward on cpu".
size_t choose_implementation(const std::string& call, const std::vector<Candidate>& candidates);

// The choice in words.
std::string explain_choice(const std::string& call, const std::vector<Candidate>& candidates);

bool verbose_dispatch();

// True if the list must be gone through in words: somebody forces a name or reads along.
bool choice_needs_reasons();

// Why an implementation that supports the problem is passed over, or null.
template <typename Implementation, typename Problem>
const char* passed_over(const Implementation& implementation, const Problem& problem) {
  if constexpr (requires { implementation.slower(problem); }) {
    if (implementation.slower != nullptr) return implementation.slower(problem);
  }
  return nullptr;
}

// `List` is a range of structs with `name` and `const char* not_supported(problem)`, and maybe
// `const char* slower(problem)`.
template <typename List, typename Problem>
std::vector<Candidate> list_candidates(const List& list, const Problem& problem) {
  const auto text = [](const char* reason) { return std::string(reason == nullptr ? "" : reason); };
  std::vector<Candidate> candidates;
  for (const auto& implementation : list) {
    candidates.push_back({implementation.name, text(implementation.not_supported(problem)),
                          text(passed_over(implementation, problem))});
  }
  return candidates;
}

// The implementation to run. The common case compares no strings and allocates nothing.
template <typename List, typename Problem>
const auto& choose_from(const List& list, const Problem& problem, const char* op,
                        const char* direction, const char* device) {
  if (!choice_needs_reasons()) {
    for (const auto& implementation : list) {
      if (implementation.not_supported(problem) == nullptr &&
          passed_over(implementation, problem) == nullptr) {
        return implementation;
      }
    }
  }
  const std::string call = std::string(op) + " " + direction + " on " + device;
  return list[choose_implementation(call, list_candidates(list, problem))];
}

}  // namespace torch_selfattn::ops

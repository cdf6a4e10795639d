#include "ops/implementation_choice.h"

#include <c10/util/Exception.h>
#include <torch_selfattn/ops.h>

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <utility>

namespace torch_selfattn {

namespace ops {

namespace {

// Backward runs on threads of the autograd engine, so the setting is one for the process.
std::mutex forced_mutex;
std::string forced_name;
std::atomic<bool> is_forced{false};

std::string names_of(const std::vector<Candidate>& candidates) {
  std::string names;
  for (const Candidate& candidate : candidates) {
    names += (names.empty() ? "" : ", ") + candidate.name;
  }
  return names;
}

}  // namespace

std::string forced_implementation() {
  const std::lock_guard lock(forced_mutex);
  return forced_name;
}

bool is_forced_implementation(const char* name) {
  if (!is_forced.load(std::memory_order_relaxed)) return false;
  const std::lock_guard lock(forced_mutex);
  return forced_name == name;
}

std::string set_forced_implementation(std::string name) {
  const std::lock_guard lock(forced_mutex);
  std::swap(forced_name, name);
  is_forced = !forced_name.empty();
  return name;
}

bool verbose_dispatch() {
  static const bool verbose = [] {
    const char* setting = std::getenv("TORCH_SELFATTN_VERBOSE");
    return setting != nullptr && std::string(setting).find("dispatch") != std::string::npos;
  }();
  return verbose;
}

bool choice_needs_reasons() {
  return is_forced.load(std::memory_order_relaxed) || verbose_dispatch();
}

size_t choose_implementation(const std::string& call, const std::vector<Candidate>& candidates) {
  const std::string forced = forced_implementation();
  size_t chosen = candidates.size();
  for (size_t i = 0; i < candidates.size() && chosen == candidates.size(); ++i) {
    const bool wanted = forced.empty()
                            ? candidates[i].reason.empty() && candidates[i].passed_over.empty()
                            : candidates[i].name == forced;
    if (wanted) chosen = i;
  }
  if (!forced.empty()) {
    TORCH_CHECK_VALUE(chosen < candidates.size(), call,
                      ": there is no implementation of the forced ", "name (got ", forced,
                      ", available: ", names_of(candidates), ")");
    TORCH_CHECK_NOT_IMPLEMENTED(candidates[chosen].reason.empty(), call,
                                ": the forced implementation does not support this call (got ",
                                forced, ": ", candidates[chosen].reason, ")");
  }
  TORCH_CHECK_NOT_IMPLEMENTED(chosen < candidates.size(), "no implementation supports this call:\n",
                              explain_choice(call, candidates));
  if (verbose_dispatch()) std::cerr << explain_choice(call, candidates) << '\n';
  return chosen;
}

std::string explain_choice(const std::string& call, const std::vector<Candidate>& candidates) {
  const std::string forced = forced_implementation();
  std::string text = call + ":";
  bool chosen = false;
  for (const Candidate& candidate : candidates) {
    text += "\n  " + candidate.name + ": ";
    if (!candidate.reason.empty()) {
      text += "not supported, " + candidate.reason;
    } else if (forced.empty() && !candidate.passed_over.empty()) {
      text += "supported, but passed over: " + candidate.passed_over;
    } else if (!forced.empty() ? candidate.name == forced : !chosen) {
      text += forced.empty() ? "runs" : "runs (forced)";
      chosen = true;
    } else {
      text += forced.empty() ? "supported, but a better one runs" : "supported, not the forced one";
    }
  }
  return text;
}

}  // namespace ops

std::string forced_implementation() { return ops::forced_implementation(); }

std::string set_forced_implementation(const std::string& name) {
  return ops::set_forced_implementation(name);
}

ImplementationGuard::ImplementationGuard(const std::string& name)
    : previous_(ops::set_forced_implementation(name)) {}

ImplementationGuard::~ImplementationGuard() { ops::set_forced_implementation(previous_); }

}  // namespace torch_selfattn

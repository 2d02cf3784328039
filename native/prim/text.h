// Error texts without streams. A stream's formatting looks up facets of the process's locale, which
// two C++ runtimes in one process cannot share: a library with a runtime of its own would crash.
#pragma once

#include <cstdio>
#include <string>
#include <type_traits>

namespace prim {

// One sentence from its parts: texts and numbers.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string all;
  const auto add = [&](const auto& part) {
    using Part = std::decay_t<decltype(part)>;
    if constexpr (std::is_floating_point_v<Part>) {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
      all += digits;
    } else if constexpr (std::is_arithmetic_v<Part>) {
      all += std::to_string(part);
    } else {
      all += part;
    }
  };
  (add(parts), ...);
  return all;
}

}  // namespace prim

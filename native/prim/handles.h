// Numbers that stand for objects outside of C++. None is given out twice, so a stale one is
// noticed; and a caller holds what it was given, so another thread's close() takes nothing from
// under it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace prim {

template <class T>
class Handles {
 public:
  // Positive: 0 can mean none.
  int64_t add(std::shared_ptr<T> object) {
    const std::lock_guard lock(mutex_);
    objects_.push_back(std::move(object));
    return static_cast<int64_t>(objects_.size());
  }
  // Null for what is no open handle.
  std::shared_ptr<T> get(int64_t handle) {
    const std::lock_guard lock(mutex_);
    return known(handle) ? objects_[handle - 1] : nullptr;
  }
  // Closes it. What it stood for, whose last user destroys it; null if it was not open.
  std::shared_ptr<T> remove(int64_t handle) {
    const std::lock_guard lock(mutex_);
    return known(handle) ? std::exchange(objects_[handle - 1], nullptr) : nullptr;
  }

 private:
  bool known(int64_t handle) const {
    return handle > 0 && handle <= static_cast<int64_t>(objects_.size());
  }

  std::mutex mutex_;
  std::vector<std::shared_ptr<T>> objects_;
};

}  // namespace prim

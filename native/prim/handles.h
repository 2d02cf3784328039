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
    entries_.push_back({object, object});
    return static_cast<int64_t>(entries_.size());
  }
  // Null for what is no open handle.
  std::shared_ptr<T> get(int64_t handle) {
    const std::lock_guard lock(mutex_);
    return known(handle) ? entries_[handle - 1].open : nullptr;
  }
  // Closes it. What it stood for, whose last user destroys it; null if it was not open.
  std::shared_ptr<T> remove(int64_t handle) {
    const std::lock_guard lock(mutex_);
    return known(handle) ? std::exchange(entries_[handle - 1].open, nullptr) : nullptr;
  }
  // The objects that exist, also those that were closed while a thread uses them.
  std::vector<std::shared_ptr<T>> all() {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<T>> found;
    for (const Entry& entry : entries_) {
      if (auto object = entry.object.lock()) found.push_back(std::move(object));
    }
    return found;
  }

  // fork() waits until no thread is in here: the child has no such thread that would leave.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  struct Entry {
    std::shared_ptr<T> open;
    std::weak_ptr<T> object;
  };
  bool known(int64_t handle) const {
    return handle > 0 && handle <= static_cast<int64_t>(entries_.size());
  }

  std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace prim

// Taking turns: one thread at a time, and never twice.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>

namespace libsd35 {

// A lock that tells its holder, who asks for it again, that this would wait for ever.
class Turn {
  public:
    class Hold {
      public:
        explicit Hold(Turn& turn) : lock_(turn.mutex_), turn_(turn) {
            turn_.holder_ = std::this_thread::get_id();
        }
        ~Hold() { turn_.holder_ = std::thread::id(); }
        Hold(const Hold&) = delete;
        Hold& operator=(const Hold&) = delete;

      private:
        std::lock_guard<std::mutex> lock_;
        Turn& turn_;
    };

    // Waits for the turn; `what` it is needed for is a function's name. Throws Error where the
    // calling thread holds it: it is in a callback.
    Hold take(const char* what);

    // Whether the calling thread holds it.
    bool is_held_here() const noexcept { return holder_ == std::this_thread::get_id(); }

  private:
    std::mutex mutex_;
    std::atomic<std::thread::id> holder_{};
};

}  // namespace libsd35

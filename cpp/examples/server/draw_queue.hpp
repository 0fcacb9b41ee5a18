// Requests that wait for one thread that draws, those that join in one run.
#pragma once

#include <condition_variable>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <sd35/sd35.hpp>
#include <thread>
#include <vector>

namespace server {

// A request from when it is accepted until it has an outcome.
class Ticket {
  public:
    explicit Ticket(sd35::Request request);

    // Ends it: before it is drawn, or after its step.
    void cancel() noexcept { cancelled_ = true; }
    bool cancelled() const noexcept { return cancelled_; }

    std::future<sd35::Outcome> outcome() { return promise_.get_future(); }

  private:
    friend class DrawQueue;

    std::atomic<bool> cancelled_{false};
    sd35::Request request_;
    std::promise<sd35::Outcome> promise_;
};

class DrawQueue {
  public:
    // At most so many requests wait.
    DrawQueue(sd35::Pipeline& pipeline, std::size_t limit);
    // Cancels what waits and what is drawn.
    ~DrawQueue();
    DrawQueue(const DrawQueue&) = delete;
    DrawQueue& operator=(const DrawQueue&) = delete;

    // NULL where as many are waiting as may.
    std::shared_ptr<Ticket> submit(sd35::Request request);

    std::size_t waiting() const;

  private:
    using Tickets = std::vector<std::shared_ptr<Ticket>>;

    void serve();
    Tickets take();
    void draw(const Tickets& tickets);

    sd35::Pipeline& pipeline_;
    std::size_t limit_;
    std::int64_t most_images_;
    mutable std::mutex mutex_;
    std::condition_variable arrived_;
    std::deque<std::shared_ptr<Ticket>> waiting_;
    Tickets drawing_;
    bool closed_ = false;
    std::thread worker_;
};

}  // namespace server

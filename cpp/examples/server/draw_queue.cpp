#include "draw_queue.hpp"

#include <algorithm>

namespace server {
namespace {

std::int64_t images_of(const sd35::Request& request) {
    return static_cast<std::int64_t>(request.prompts.size()) * request.batch;
}

}  // namespace

Ticket::Ticket(sd35::Request request) : request_(std::move(request)) {
    request_.callback = [this](const sd35::Step&) { return !cancelled_; };
}

DrawQueue::DrawQueue(sd35::Pipeline& pipeline, std::size_t limit)
    : pipeline_(pipeline),
      limit_(limit),
      most_images_(pipeline.info().batch[1]),
      worker_([this] { serve(); }) {}

DrawQueue::~DrawQueue() {
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        for (const auto& ticket : waiting_) ticket->cancel();
        for (const auto& ticket : drawing_) ticket->cancel();
    }
    arrived_.notify_all();
    worker_.join();
}

std::shared_ptr<Ticket> DrawQueue::submit(sd35::Request request) {
    auto ticket = std::make_shared<Ticket>(std::move(request));
    {
        const std::lock_guard lock(mutex_);
        if (closed_ || waiting_.size() >= limit_) return nullptr;
        waiting_.push_back(ticket);
    }
    arrived_.notify_one();
    return ticket;
}

std::size_t DrawQueue::waiting() const {
    const std::lock_guard lock(mutex_);
    return waiting_.size();
}

void DrawQueue::serve() {
    for (Tickets tickets = take(); !tickets.empty(); tickets = take()) draw(tickets);
}

// The request that waits longest and what fits with it; none at the end.
DrawQueue::Tickets DrawQueue::take() {
    std::unique_lock lock(mutex_);
    drawing_.clear();
    arrived_.wait(lock, [this] { return closed_ || !waiting_.empty(); });
    if (waiting_.empty()) return {};
    Tickets taken;
    std::int64_t room = most_images_;
    for (auto next = waiting_.begin(); next != waiting_.end();) {
        const sd35::Request& request = (*next)->request_;
        const bool fits = taken.empty() || (images_of(request) <= room &&
                                            pipeline_.joins(taken.front()->request_, request));
        if (!fits) {
            ++next;
            continue;
        }
        room -= images_of(request);
        taken.push_back(std::move(*next));
        next = waiting_.erase(next);
    }
    drawing_ = taken;
    return taken;
}

void DrawQueue::draw(const Tickets& tickets) {
    Tickets wanted;
    for (const auto& ticket : tickets) {
        if (ticket->cancelled()) {
            ticket->promise_.set_value(
                sd35::Error(SD35_CANCELLED, "cancelled before it was drawn"));
        } else {
            wanted.push_back(ticket);
        }
    }
    if (wanted.empty()) return;
    std::vector<sd35::Request> requests;
    for (const auto& ticket : wanted) requests.push_back(ticket->request_);
    std::vector<sd35::Outcome> outcomes = pipeline_.generate_joined(requests);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        wanted[i]->promise_.set_value(std::move(outcomes[i]));
    }
}

}  // namespace server

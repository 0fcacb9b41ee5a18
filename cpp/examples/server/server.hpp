// The HTTP side: POST /v1/images/generations and /v1/images/edits, GET /health, GET /metrics.
#pragma once

#include <memory>
#include <sd35/sd35.hpp>
#include <set>
#include <string>

namespace server {

struct Options {
    std::string host = "127.0.0.1";
    int port = 8080;  // 0 takes a free one
    std::size_t queue_limit = 64;
    std::set<std::string> adapters;  // that requests may name
};

class Server {
  public:
    Server(sd35::Pipeline& pipeline, const Options& options);
    ~Server();
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    // Binds; returns the port. Throws std::runtime_error.
    int bind();
    // Serves until stop() is called.
    void run();
    // May be called from any thread.
    void stop();

  private:
    class Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace server

#include "server.hpp"

#include <httplib.h>

#include <chrono>

#include "draw_queue.hpp"
#include "images_api.hpp"
#include "metrics.hpp"

namespace server {
namespace {

// How often it is looked whether the client is still there.
constexpr std::chrono::milliseconds look_again{20};

constexpr std::size_t largest_body = 16 << 20;

// Connections that are served beside those whose requests wait.
constexpr std::size_t spare_threads = 16;

// What nobody reads any more.
constexpr int client_gone = 499;

int status_of(sd35_status status) {
    switch (status) {
        case SD35_USAGE:
            return 400;
        case SD35_CANCELLED:
            return client_gone;
        case SD35_OUT_OF_MEMORY:
            return 503;
        default:
            return 500;
    }
}

void answer(httplib::Response& response, int status, const nlohmann::json& body) {
    response.status = status;
    // A message may quote what is no UTF-8.
    response.set_content(body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace),
                         "application/json");
}

void refuse(httplib::Response& response, int status, std::string_view message) {
    const char* type = status < 500 ? "invalid_request_error" : "server_error";
    answer(response, status, error_of(message, status == 429 ? "rate_limit_error" : type, status));
}

// A request's form. Since 0.24, cpp-httplib tells fields from files.
template <typename Request>
auto form_of(const Request& request, int) -> decltype(request.form, Form()) {
    Form form;
    for (const auto& [name, field] : request.form.fields) form.fields[name] = field.content;
    for (const auto& [name, file] : request.form.files) form.files[name] = file.content;
    return form;
}

template <typename Request>
auto form_of(const Request& request, long) -> decltype(request.files, Form()) {
    Form form;
    for (const auto& [name, part] : request.files) {
        (part.filename.empty() ? form.fields : form.files)[name] = part.content;
    }
    return form;
}

// What came of a request; a client that has gone cancels it.
sd35::Outcome wait_for(Ticket& ticket, const httplib::Request& request) {
    std::future<sd35::Outcome> outcome = ticket.outcome();
    while (outcome.wait_for(look_again) != std::future_status::ready) {
        if (request.is_connection_closed()) ticket.cancel();
    }
    return outcome.get();
}

}  // namespace

class Server::Impl {
  public:
    Impl(sd35::Pipeline& pipeline, const Options& options)
        : pipeline_(pipeline), options_(options), queue_(pipeline, options.queue_limit) {
        const std::size_t threads = options.queue_limit + spare_threads;
        http_.new_task_queue = [threads] { return new httplib::ThreadPool(threads); };
        http_.set_payload_max_length(largest_body);
        http_.Post("/v1/images/generations",
                   [this](const httplib::Request& request, httplib::Response& response) {
                       generate(request, response, [&] { return read_request(request.body); });
                   });
        http_.Post("/v1/images/edits", [this](const httplib::Request& request,
                                              httplib::Response& response) {
            const bool masks = pipeline_.info().inpainting != 0;
            generate(request, response, [&] { return read_edit(form_of(request, 0), masks); });
        });
        http_.Get("/health", [](const httplib::Request&, httplib::Response& response) {
            answer(response, 200, {{"status", "ok"}});
        });
        http_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
            response.set_content(
                metrics_.text(queue_.waiting(), pipeline_.anomalies(), pipeline_.on_fallback()),
                "text/plain; version=0.0.4");
        });
        http_.set_exception_handler(
            [](const httplib::Request&, httplib::Response& response, const std::exception_ptr&) {
                refuse(response, 500, "the server failed");
            });
    }

    int bind() {
        const int port =
            options_.port == 0
                ? http_.bind_to_any_port(options_.host)
                : (http_.bind_to_port(options_.host, options_.port) ? options_.port : -1);
        if (port < 0) {
            throw std::runtime_error("cannot listen on " + options_.host + ":" +
                                     std::to_string(options_.port) + " — choose another --port");
        }
        return port;
    }

    void run() { http_.listen_after_bind(); }
    void stop() { http_.stop(); }

  private:
    template <typename Read>
    void generate(const httplib::Request& request, httplib::Response& response, const Read& read) {
        const auto start = std::chrono::steady_clock::now();
        try {
            draw(request, response, read());
        } catch (const BadRequest& error) {
            refuse(response, 400, error.what());
        } catch (const sd35::Error& error) {
            refuse(response, status_of(error.status()), error.what());
        }
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        metrics_.count(response.status, taken.count());
    }

    void draw(const httplib::Request& request, httplib::Response& response, sd35::Request asked) {
        check_adapters(asked);
        pipeline_.check(asked);
        const std::shared_ptr<Ticket> ticket = queue_.submit(std::move(asked));
        if (ticket == nullptr) {
            response.set_header("Retry-After", "1");
            refuse(
                response, 429,
                std::to_string(options_.queue_limit) + " requests are waiting — try again later");
            return;
        }
        const sd35::Outcome outcome = wait_for(*ticket, request);
        if (const auto* error = std::get_if<sd35::Error>(&outcome)) {
            refuse(response, status_of(error->status()), error->what());
            return;
        }
        const auto& result = std::get<sd35::Result>(outcome);
        metrics_.count_stages(result);
        answer(response, 200, response_of(result));
    }

    // Other names would be paths of files here.
    void check_adapters(const sd35::Request& request) const {
        for (const sd35::Mix& mix : request.adapters) {
            for (const auto& [name, _] : mix) {
                if (options_.adapters.count(name) == 0) {
                    throw BadRequest("there is no adapter " + quoted(name));
                }
            }
        }
    }

    sd35::Pipeline& pipeline_;
    Options options_;
    Metrics metrics_;
    DrawQueue queue_;
    httplib::Server http_;
};

Server::Server(sd35::Pipeline& pipeline, const Options& options)
    : impl_(std::make_unique<Impl>(pipeline, options)) {}

Server::~Server() = default;

int Server::bind() {
    return impl_->bind();
}

void Server::run() {
    impl_->run();
}

void Server::stop() {
    impl_->stop();
}

}  // namespace server

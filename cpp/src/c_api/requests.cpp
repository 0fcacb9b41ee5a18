// Requests and their drawing.
#include <vector>

#include "c_api/handles.hpp"

using libsd35::guarded;
using libsd35::Job;
using libsd35::require;

namespace {

sd35_request own_request(const sd35_request* request) {
    require(request, "request");
    return libsd35::with_usual_values(request, sd35_request_init, "request");
}

Job make_job(const sd35_pipeline& pipeline, const sd35_request* request) {
    const sd35_request own = own_request(request);
    Job job{pipeline.pipeline.request(own)};
    job.callback = own.callback;
    job.callback_user = own.callback_user;
    return job;
}

std::vector<Job*> pointers(std::vector<Job>& jobs) {
    std::vector<Job*> result;
    for (Job& job : jobs) result.push_back(&job);
    return result;
}

// The outcome of a job, as one of result and error.
sd35_status hand_over(Job& job, sd35_result** result, sd35_error** error) noexcept {
    return guarded(error, [&] {
        if (const libsd35::Error* reason = job.error()) throw *reason;
        libsd35::Result* drawn = job.result();
        if (drawn == nullptr) {
            throw libsd35::Error(SD35_FAILED, "the request was not drawn", "report this");
        }
        *result = std::make_unique<sd35_result>(sd35_result{std::move(*drawn)}).release();
    });
}

}  // namespace

void sd35_request_init(sd35_request* request) {
    *request = {};
    request->size = sizeof *request;
    request->batch = 1;
    request->steps = SD35_UNSET;
    request->guidance = static_cast<double>(SD35_UNSET);
    request->shift = static_cast<double>(SD35_UNSET);
    request->width = SD35_UNSET;
    request->height = SD35_UNSET;
    request->t5_tokens = SD35_UNSET;
    request->strength = 0.6;
    request->skip_layer_guidance_scale = 2.8;
    request->skip_layer_guidance_start = 0.01;
    request->skip_layer_guidance_stop = 0.2;
    request->decode = 1;
}

void sd35_control_init(sd35_control* control) {
    *control = {};
    control->size = sizeof *control;
    control->scale = 1;
    control->end = 1;
}

sd35_status sd35_step_denoised(const sd35_step* step, const float** denoised, sd35_error** error) {
    return guarded(error, [&] {
        require(step, "step");
        require(denoised, "denoised");
        *denoised = libsd35::denoised_of(step->source);
    });
}

sd35_status sd35_pipeline_check(const sd35_pipeline* pipeline, const sd35_request* request,
                                sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        pipeline->pipeline.request(own_request(request));
    });
}

sd35_status sd35_pipeline_joins(const sd35_pipeline* pipeline, const sd35_request* one,
                                const sd35_request* other, int* joins, sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        require(joins, "joins");
        const libsd35::Request first = pipeline->pipeline.request(own_request(one));
        const libsd35::Request second = pipeline->pipeline.request(own_request(other));
        *joins = pipeline->pipeline.joins(first, second) ? 1 : 0;
    });
}

sd35_status sd35_pipeline_generate(sd35_pipeline* pipeline, const sd35_request* request,
                                   sd35_result** result, sd35_error** error) {
    sd35_status status = SD35_OK;
    const sd35_status called = guarded(error, [&] {
        require(pipeline, "pipeline");
        require(result, "result");
        *result = nullptr;
        Job job = make_job(*pipeline, request);
        pipeline->pipeline.draw({&job});
        status = hand_over(job, result, error);
    });
    return called == SD35_OK ? status : called;
}

sd35_status sd35_pipeline_generate_joined(sd35_pipeline* pipeline,
                                          const sd35_request* const* requests, size_t count,
                                          sd35_result** results, sd35_error** errors) {
    if (results == nullptr || errors == nullptr) return SD35_USAGE;
    std::fill_n(results, count, nullptr);
    std::fill_n(errors, count, nullptr);
    sd35_status first = SD35_OK;
    const auto fail = [&](std::size_t i, const libsd35::Error& error) {
        const sd35_status status = libsd35::tell(&errors[i], error);
        if (first == SD35_OK) first = status;
    };
    std::vector<Job> jobs;
    try {
        require(pipeline, "pipeline");
        require(requests, "requests");
        if (count == 0) throw libsd35::usage_error("there are no requests", "give one");
        for (std::size_t i = 0; i < count; ++i) jobs.push_back(make_job(*pipeline, requests[i]));
        pipeline->pipeline.draw(pointers(jobs));
    } catch (...) {
        // Jobs whose outcome was known before have it.
        const libsd35::Error error = libsd35::current_error();
        for (std::size_t i = 0; i < count; ++i) {
            if (i >= jobs.size() || !jobs[i].ended()) fail(i, error);
        }
    }
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        if (errors[i] != nullptr) continue;
        const sd35_status status = hand_over(jobs[i], &results[i], &errors[i]);
        if (first == SD35_OK) first = status;
    }
    return first;
}

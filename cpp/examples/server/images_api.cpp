#include "images_api.hpp"

#include <charconv>
#include <ctime>
#include <limits>
#include <set>

#include "json_text.hpp"
#include "png.hpp"

namespace server {
namespace {

using nlohmann::json;

// As nested as no request is.
constexpr int deepest = 16;

json parse(std::string_view body) {
    const auto check_depth = [](int depth, json::parse_event_t, json&) {
        if (depth > deepest) throw BadRequest("the body is nested too deeply");
        return true;
    };
    try {
        return json::parse(without_lone_surrogates(body), check_depth);
    } catch (const json::exception& error) {
        throw BadRequest(std::string("the body is no JSON: ") + error.what());
    }
}

std::string text(const json& fields, const char* name) {
    const json& value = fields.at(name);
    if (!value.is_string()) throw BadRequest(std::string(name) + " must be text");
    return value.get<std::string>();
}

double number(const json& fields, const char* name) {
    const json& value = fields.at(name);
    if (!value.is_number()) throw BadRequest(std::string(name) + " must be a number");
    return value.get<double>();
}

std::int64_t whole_of(const json& value, const std::string& name) {
    const bool fits = value.is_number_integer() &&
                      (!value.is_number_unsigned() ||
                       value.get<std::uint64_t>() <=
                           static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()));
    if (!fits) throw BadRequest(name + " must be a whole number");
    return value.get<std::int64_t>();
}

std::int64_t whole(const json& fields, const char* name) {
    return whole_of(fields.at(name), name);
}

std::uint64_t seed(const json& fields) {
    const json& value = fields.at("seed");
    if (!value.is_number_unsigned()) throw BadRequest("seed must be a whole number from 0");
    return value.get<std::uint64_t>();
}

// Width and height of "1024x1024".
std::pair<std::int64_t, std::int64_t> size(const std::string& value) {
    const char* const end = value.data() + value.size();
    std::int64_t width = 0;
    std::int64_t height = 0;
    const auto first = std::from_chars(value.data(), end, width);
    if (first.ec == std::errc() && first.ptr != end && *first.ptr == 'x') {
        const auto second = std::from_chars(first.ptr + 1, end, height);
        if (second.ec == std::errc() && second.ptr == end) return {width, height};
    }
    throw BadRequest("size must be such as 1024x1024, or auto");
}

bool flag(const json& fields, const char* name) {
    const json& value = fields.at(name);
    if (!value.is_boolean()) throw BadRequest(std::string(name) + " must be true or false");
    return value.get<bool>();
}

const json& object(const json& fields, const char* name) {
    const json& value = fields.at(name);
    if (!value.is_object()) throw BadRequest(std::string(name) + " must be an object");
    return value;
}

// Fields that are text, also in a form.
const std::set<std::string>& texts() {
    static const std::set<std::string> names{
        "prompt", "prompt_2",          "prompt_3", "negative_prompt", "negative_prompt_2",
        "size",   "negative_prompt_3", "sampler",  "response_format", "model",
        "user"};
    return names;
}

const std::set<std::string>& others() {
    static const std::set<std::string> names{"n",
                                             "seed",
                                             "steps",
                                             "shift",
                                             "guidance",
                                             "t5_tokens",
                                             "weighting",
                                             "adapters",
                                             "control",
                                             "skip_guidance_layers",
                                             "skip_layer_guidance_scale",
                                             "skip_layer_guidance_start",
                                             "skip_layer_guidance_stop"};
    return names;
}

void check_fields(const json& fields, const std::set<std::string>& more) {
    if (!fields.is_object()) throw BadRequest("the body must be an object");
    for (auto field = fields.begin(); field != fields.end(); ++field) {
        const std::string& name = field.key();
        if (texts().count(name) + others().count(name) + more.count(name) == 0) {
            throw BadRequest("the field " + quoted(name) + " is not known");
        }
    }
    if (!fields.contains("prompt")) throw BadRequest("prompt is missing");
    if (fields.contains("response_format") && text(fields, "response_format") != "b64_json") {
        throw BadRequest("response_format must be b64_json");
    }
}

void read_texts(const json& fields, sd35::Request& request) {
    const auto read = [&](const char* name, std::vector<std::string>& into) {
        if (fields.contains(name)) into = {text(fields, name)};
    };
    read("prompt", request.prompts);
    read("prompt_2", request.prompts_2);
    read("prompt_3", request.prompts_3);
    read("negative_prompt", request.negatives);
    read("negative_prompt_2", request.negatives_2);
    read("negative_prompt_3", request.negatives_3);
    if (fields.contains("weighting")) request.weighting = flag(fields, "weighting");
}

std::optional<sd35::SkipLayerGuidance> skip_layers(const json& fields) {
    if (!fields.contains("skip_guidance_layers")) return std::nullopt;
    const json& layers = fields.at("skip_guidance_layers");
    if (!layers.is_array()) throw BadRequest("skip_guidance_layers must be a list");
    sd35::SkipLayerGuidance skip;
    for (const json& layer : layers) {
        skip.layers.push_back(whole_of(layer, "a layer of skip_guidance_layers"));
    }
    const auto read = [&](const char* name, double& into) {
        if (fields.contains(name)) into = number(fields, name);
    };
    read("skip_layer_guidance_scale", skip.scale);
    read("skip_layer_guidance_start", skip.start);
    read("skip_layer_guidance_stop", skip.stop);
    return skip;
}

sd35::Mix mix_of(const json& adapters) {
    sd35::Mix mix;
    for (auto one = adapters.begin(); one != adapters.end(); ++one) {
        mix[one.key()] = number(adapters, one.key().c_str());
    }
    return mix;
}

sd35::Control control_of(const json& fields, const std::string& name) {
    const std::string place = "control." + name;
    if (!fields.is_object()) throw BadRequest(place + " must be an object");
    for (auto field = fields.begin(); field != fields.end(); ++field) {
        if (field.key() != "image" && field.key() != "scale" && field.key() != "start" &&
            field.key() != "end") {
            throw BadRequest("the field " + quoted(field.key()) + " of " + place + " is not known");
        }
    }
    if (!fields.contains("image")) throw BadRequest(place + ".image is missing");
    sd35::Control control;
    control.image = picture_of(upload_of_text(text(fields, "image"), place + ".image"));
    if (fields.contains("scale")) control.scale = number(fields, "scale");
    if (fields.contains("start")) control.start = number(fields, "start");
    if (fields.contains("end")) control.end = number(fields, "end");
    return control;
}

// What both kinds of request have.
sd35::Request request_of(const json& fields) {
    sd35::Request request;
    read_texts(fields, request);
    if (fields.contains("n")) request.batch = whole(fields, "n");
    if (fields.contains("size") && text(fields, "size") != "auto") {
        request.size = size(text(fields, "size"));
    }
    if (fields.contains("seed")) request.seed = seed(fields);
    if (fields.contains("steps")) request.steps = whole(fields, "steps");
    if (fields.contains("shift")) request.shift = number(fields, "shift");
    if (fields.contains("guidance")) request.guidance = number(fields, "guidance");
    if (fields.contains("sampler")) request.sampler = text(fields, "sampler");
    if (fields.contains("t5_tokens")) request.t5_tokens = whole(fields, "t5_tokens");
    request.skip_layers = skip_layers(fields);
    if (fields.contains("adapters")) request.adapters = {mix_of(object(fields, "adapters"))};
    if (fields.contains("control")) {
        const json& controls = object(fields, "control");
        for (auto one = controls.begin(); one != controls.end(); ++one) {
            request.controls[one.key()] = control_of(one.value(), one.key());
        }
    }
    return request;
}

// A form's fields as a body of JSON.
json body_of(const Form& form) {
    json fields = json::object();
    for (const auto& [name, value] : form.fields) {
        if (texts().count(name) != 0) {
            // Half a character is replaced, as in JSON.
            fields[name] = json::parse(quoted(value));
            continue;
        }
        try {
            fields[name] = parse(value);
        } catch (const BadRequest&) {
            throw BadRequest(name + " must be as in JSON");
        }
    }
    return fields;
}

}  // namespace

std::string quoted(const std::string& name) {
    return json(name).dump(-1, ' ', false, json::error_handler_t::replace);
}

sd35::Request read_request(std::string_view body) {
    const json fields = parse(body);
    check_fields(fields, {});
    return request_of(fields);
}

sd35::Request read_edit(const Form& form, bool masks) {
    const json fields = body_of(form);
    check_fields(fields, {"strength", "paste"});
    for (const auto& [name, _] : form.files) {
        if (name != "image" && name != "mask") {
            throw BadRequest("the file " + quoted(name) + " is not known");
        }
    }
    const auto image = form.files.find("image");
    if (image == form.files.end()) throw BadRequest("image is missing");
    const Rgba upload = upload_of(image->second, "image");
    sd35::Request request = request_of(fields);
    request.image = picture_of(upload);
    if (const auto mask = form.files.find("mask"); mask != form.files.end()) {
        request.mask = mask_of(upload_of(mask->second, "mask"));
    } else if (masks && is_clear(upload)) {
        request.mask = mask_of(upload);
    }
    if (request.mask) request.strength = 1.0;
    if (fields.contains("strength")) request.strength = number(fields, "strength");
    if (fields.contains("paste")) request.paste = flag(fields, "paste");
    return request;
}

json response_of(const sd35::Result& result) {
    json data = json::array();
    for (std::size_t i = 0; i < result.count(); ++i) {
        const std::string png = png_of(result.image(i).data(), result.width(), result.height());
        data.push_back({{"b64_json", base64(png)}, {"seed", result.seed(i)}});
    }
    return {{"created", static_cast<std::int64_t>(std::time(nullptr))},
            {"data", data},
            {"output_format", "png"},
            {"notes", result.notes()}};
}

json error_of(std::string_view message, std::string_view type, int status) {
    return {{"error", {{"message", message}, {"type", type}, {"code", status}}}};
}

}  // namespace server

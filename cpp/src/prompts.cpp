#include "prompts.hpp"

#include <tuple>

#include "arguments.hpp"
#include "error.hpp"
#include "text.hpp"
#include "token_weights.hpp"

namespace libsd35 {
namespace {

using Column = std::vector<std::string>;

auto fields(const Prompt& prompt) {
    return std::tie(prompt.clip_l, prompt.clip_g, prompt.t5, prompt.weighted);
}

Column column_of(const std::string& name, const GivenTexts& given, std::uint32_t limit) {
    if (given.values == nullptr && given.count != 0) throw usage_error(name + " is NULL");
    Column column;
    for (std::size_t i = 0; i < given.count; ++i) {
        column.push_back(text_of(entry_name(name, i, given.count), given.values[i], limit));
    }
    return column;
}

// How many prompts columns make.
std::size_t common_count(const std::array<Column, 3>& columns) {
    for (const Column& column : columns) {
        if (column.size() != 1) return column.size();
    }
    return 1;
}

}  // namespace

const std::string& Prompt::text_of(std::string_view encoder) const {
    return encoder == "clip_l" ? clip_l : encoder == "clip_g" ? clip_g : t5;
}

bool operator==(const Prompt& one, const Prompt& other) {
    return fields(one) == fields(other);
}

bool operator<(const Prompt& one, const Prompt& other) {
    return fields(one) < fields(other);
}

std::vector<Prompt> make_prompts(const std::string& name, const std::array<GivenTexts, 3>& given,
                                 bool weighted, std::uint32_t limit) {
    const std::array<std::string, 3> names{name, name + "_2", name + "_3"};
    std::array<Column, 3> columns;
    for (std::size_t i = 0; i < columns.size(); ++i) {
        columns[i] = given[i].count == 0 ? columns[0] : column_of(names[i], given[i], limit);
    }
    const std::size_t count = common_count(columns);
    for (std::size_t i = 0; i < columns.size(); ++i) {
        if (columns[i].size() == 1) columns[i].resize(count, columns[i].front());
        if (columns[i].size() == count) continue;
        throw usage_error(names[i] + " has " + std::to_string(columns[i].size()) +
                              " texts, another of " + join({names.begin(), names.end()}) + " has " +
                              std::to_string(count),
                          "give one text, or lists of one length");
    }
    std::vector<Prompt> prompts;
    for (std::size_t i = 0; i < count; ++i) {
        prompts.push_back({columns[0][i], columns[1][i], columns[2][i], weighted});
        if (!weighted) continue;
        // Refused now, not where others are drawn in the same run.
        for (const Column& column : columns) weighted_parts(column[i]);
    }
    return prompts;
}

}  // namespace libsd35

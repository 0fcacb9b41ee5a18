#include "python_json.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace libsd35 {
namespace {

std::string rewritten(const char* text) {
    return python_json(nlohmann::json::parse(text));
}

TEST(PythonJson, KeysAreSortedAndSpacesArePythons) {
    EXPECT_EQ(rewritten(R"({"b":[1,2,{}],"a":{"x":null,"y":true},"c":[]})"),
              R"({"a": {"x": null, "y": true}, "b": [1, 2, {}], "c": []})");
}

TEST(PythonJson, NumbersAreAsReprHasThem) {
    EXPECT_EQ(rewritten("[3.0, 1e16, 1e15, 0.0001, 0.00001, 20000.5, 0.1, -2.5e-7, 1E5, 1e22]"),
              "[3.0, 1e+16, 1000000000000000.0, 0.0001, 1e-05, 20000.5, 0.1, -2.5e-07, 100000.0, "
              "1e+22]");
    EXPECT_EQ(rewritten("[9223372036854775807, -5, 18446744073709551615]"),
              "[9223372036854775807, -5, 18446744073709551615]");
}

TEST(PythonJson, AllButAsciiIsEscaped) {
    EXPECT_EQ(rewritten("[\"gr\\u00fcn \\ud83c\\udf08 \\\"\\\\ \\n\\u0001\\u007f/\"]"),
              "[\"gr\\u00fcn \\ud83c\\udf08 \\\"\\\\ \\n\\u0001\\u007f/\"]");
}

}  // namespace
}  // namespace libsd35

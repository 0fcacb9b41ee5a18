#include "text.hpp"

#include <gtest/gtest.h>

#include <clocale>

#include "error.hpp"

namespace libsd35 {
namespace {

TEST(Text, CountsCharactersOfEveryPlane) {
    EXPECT_EQ(count_characters(""), 0U);
    EXPECT_EQ(count_characters(std::string_view("a\0b", 3)), 3U);
    EXPECT_EQ(count_characters("gr\xC3\xBCn \xE4\xB8\x80 \xF0\x9F\x8C\x88"), 8U);
    EXPECT_EQ(count_characters("\xF4\x8F\xBF\xBF"), 1U);
}

TEST(Text, WhatIsNoUtf8HasNoCharacters) {
    for (const char* text : {"\x80", "\xC0\xAF", "\xC3", "\xE0\x80\xAF", "\xED\xA0\x80",
                             "\xED\xBF\xBF", "\xF0\x80\x80\x80", "\xF4\x90\x80\x80",
                             "\xF8\x88\x80\x80\x80", "\xFF", "a\xE4\xB8", "\xC3(", "\xE4(\x80"}) {
        EXPECT_EQ(count_characters(text), std::nullopt) << text;
    }
}

TEST(Text, NumbersAreWrittenAsPythonDoes) {
    EXPECT_EQ(general(0.01), "0.01");
    EXPECT_EQ(general(100), "100");
    EXPECT_EQ(general(1e20), "1e+20");
    EXPECT_EQ(general(0.12345678, 3), "0.123");
    EXPECT_EQ(general(std::numeric_limits<double>::quiet_NaN()), "nan");
    EXPECT_EQ(fixed(0.5, 3), "0.500");
    EXPECT_EQ(grouped(0), "0");
    EXPECT_EQ(grouped(1234567), "1,234,567");
    EXPECT_EQ(grouped(123), "123");
}

TEST(Text, TheLocaleHasNoSay) {
    const std::string before = std::setlocale(LC_ALL, nullptr);
    if (std::setlocale(LC_ALL, "de_DE.UTF-8") == nullptr) GTEST_SKIP() << "no German locale here";
    EXPECT_EQ(general(0.5), "0.5");
    std::setlocale(LC_ALL, before.c_str());
}

TEST(Text, Bytes) {
    EXPECT_EQ(format_bytes(999), "999 B");
    EXPECT_EQ(format_bytes(23'600'000), "23.6 MB");
    EXPECT_EQ(format_bytes(5e12), "5000.0 GB");
    EXPECT_EQ(format_memory(std::uint64_t{8} << 30), "8 GiB");
    EXPECT_EQ(format_memory(8'000'000'000), "8.0 GB");
}

TEST(Text, Versions) {
    EXPECT_EQ(version_numbers("1.24.2"), (std::vector<int>{1, 24, 2}));
    EXPECT_EQ(version_numbers("1.32.0-rc1"), (std::vector<int>{1, 32, 0, 1}));
    EXPECT_EQ(version_numbers(""), std::vector<int>());
    EXPECT_LT(version_numbers("1.9.10"), version_numbers("1.24.2"));
}

TEST(Text, ValuesInMessagesAreShortAndPrintable) {
    EXPECT_EQ(shown("euler\n\xC3"), "'euler\\x0a\\xc3'");
    EXPECT_LT(shown(std::string(1000, 'x')).size(), 80U);
}

TEST(Errors, AreOneLineThatEndsWithTheFix) {
    EXPECT_EQ(usage_error("a\n  b.", "do c").message(), "a b — do c");
    EXPECT_EQ(bundle_error("a").message(), "a");
}

}  // namespace
}  // namespace libsd35

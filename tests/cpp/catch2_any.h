#pragma once

// Catch2 3 where it is installed, else 2.13: TEST_CASE, SECTION, REQUIRE and Approx are the same.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif

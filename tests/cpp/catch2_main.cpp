// Catch2 2 is header-only and wants its main in one file; Catch2 3 brings its own.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>

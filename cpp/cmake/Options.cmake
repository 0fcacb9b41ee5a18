# Options, and how everything here is compiled.

option(SD35_TESTS "Build the tests (GoogleTest)" OFF)
option(SD35_WERROR "Warnings are errors" OFF)
option(SD35_FUZZ "Build the programs of libFuzzer" OFF)
set(SD35_SANITIZE "" CACHE STRING "Sanitizers, such as address,undefined or thread")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Kind of build" FORCE)
endif()

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

add_library(sd35_flags INTERFACE)
target_compile_options(sd35_flags INTERFACE
  -Wall -Wextra -Wpedantic -Wconversion -Wshadow
  # The arithmetic on the host is specified to the bit: a product and a sum are two roundings.
  -ffp-contract=off
  -ffunction-sections -fdata-sections
  $<$<BOOL:${SD35_WERROR}>:-Werror>)
if(SD35_SANITIZE)
  target_compile_options(sd35_flags INTERFACE
    -fsanitize=${SD35_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(sd35_flags INTERFACE -fsanitize=${SD35_SANITIZE})
else()
  target_link_options(sd35_flags INTERFACE -Wl,-z,defs)
endif()

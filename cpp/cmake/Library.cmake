# libsd35: its parts as objects, which tests link too, and the shared library of them.

find_package(Threads REQUIRED)
find_package(nlohmann_json 3.10 QUIET)
if(NOT nlohmann_json_FOUND)
  message(FATAL_ERROR "nlohmann-json is missing: install nlohmann-json3-dev")
endif()

configure_file(src/version.hpp.in generated/version.hpp @ONLY)

file(GLOB core_sources CONFIGURE_DEPENDS src/*.cpp src/plugin/*.cpp src/c_api/*.cpp)
add_library(sd35_core OBJECT ${core_sources})
target_include_directories(sd35_core
  PUBLIC include src ${CMAKE_CURRENT_BINARY_DIR}/generated)
target_link_libraries(sd35_core
  PRIVATE sd35_flags
  PUBLIC nlohmann_json::nlohmann_json sd35_tokenizers Threads::Threads)

add_library(sd35 SHARED)
add_library(sd35::sd35 ALIAS sd35)
target_link_libraries(sd35 PRIVATE sd35_core sd35_flags)
target_include_directories(sd35 INTERFACE
  $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
set_target_properties(sd35 PROPERTIES
  VERSION ${PROJECT_VERSION}
  SOVERSION ${PROJECT_VERSION_MAJOR}
  LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map)
target_link_options(sd35 PRIVATE
  -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map
  -Wl,--gc-sections
  $<$<CONFIG:Release,MinSizeRel>:-Wl,-s>)

# Where plug-ins are, beside the library.
set(SD35_PLUGIN_DIR ${CMAKE_CURRENT_BINARY_DIR}/sd35)

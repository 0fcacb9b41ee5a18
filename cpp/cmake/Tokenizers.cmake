# The crate in tokenizers/, as a static library.

find_program(SD35_CARGO cargo HINTS $ENV{HOME}/.cargo/bin)
if(NOT SD35_CARGO)
  message(FATAL_ERROR "cargo is missing: install Rust from https://rustup.rs")
endif()

# Compiled once for all build directories that name the same one.
set(SD35_CARGO_DIR ${CMAKE_CURRENT_BINARY_DIR}/cargo CACHE PATH "Where cargo builds")
set(crate ${CMAKE_CURRENT_SOURCE_DIR}/tokenizers)
set(archive ${SD35_CARGO_DIR}/release/libsd35_tokenizers.a)
file(GLOB crate_sources CONFIGURE_DEPENDS ${crate}/src/*.rs)

add_custom_command(
  OUTPUT ${archive}
  COMMAND ${SD35_CARGO} build --release --locked --quiet
          --manifest-path ${crate}/Cargo.toml --target-dir ${SD35_CARGO_DIR}
  # Cargo leaves an archive that is up to date as old as it is.
  COMMAND ${CMAKE_COMMAND} -E touch ${archive}
  DEPENDS ${crate}/Cargo.toml ${crate}/Cargo.lock ${crate_sources}
  COMMENT "Building tokenizers"
  VERBATIM)
add_custom_target(sd35_tokenizers_archive DEPENDS ${archive})

add_library(sd35_tokenizers INTERFACE)
add_dependencies(sd35_tokenizers sd35_tokenizers_archive)
target_include_directories(sd35_tokenizers INTERFACE ${crate}/include)
target_link_libraries(sd35_tokenizers INTERFACE ${archive} ${CMAKE_DL_LIBS} m)

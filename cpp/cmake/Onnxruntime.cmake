# The plug-in for ONNX Runtime. Its headers are needed to build it; the library is opened at run
# time: that which was found here, or another of the same or a newer version.

find_package(onnxruntime CONFIG QUIET)
if(TARGET onnxruntime::onnxruntime)
  get_target_property(onnxruntime_INCLUDE_DIR onnxruntime::onnxruntime
                      INTERFACE_INCLUDE_DIRECTORIES)
  get_target_property(onnxruntime_LIBRARY onnxruntime::onnxruntime LOCATION)
else()
  find_path(onnxruntime_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ${onnxruntime_ROOT}
            PATH_SUFFIXES include include/onnxruntime onnxruntime
                          include/onnxruntime/core/session)
  find_library(onnxruntime_LIBRARY onnxruntime HINTS ${onnxruntime_ROOT} PATH_SUFFIXES lib capi)
endif()

if(NOT onnxruntime_INCLUDE_DIR)
  message(STATUS "Not built: libsd35-onnxruntime.so; its headers are missing "
                 "(install libonnxruntime-dev, or give -Donnxruntime_ROOT=DIR)")
  return()
endif()
if(NOT onnxruntime_LIBRARY)
  set(onnxruntime_LIBRARY "")
endif()

file(GLOB onnxruntime_sources CONFIGURE_DEPENDS backends/onnxruntime/*.cpp)
add_library(sd35-onnxruntime MODULE ${onnxruntime_sources} src/dtype.cpp src/error.cpp src/text.cpp)
target_include_directories(sd35-onnxruntime PRIVATE include src)
target_include_directories(sd35-onnxruntime SYSTEM PRIVATE ${onnxruntime_INCLUDE_DIR})
target_compile_definitions(sd35-onnxruntime PRIVATE
  SD35_ONNXRUNTIME_LIBRARY="${onnxruntime_LIBRARY}")
target_link_libraries(sd35-onnxruntime PRIVATE sd35_flags ${CMAKE_DL_LIBS})
set_target_properties(sd35-onnxruntime PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${SD35_PLUGIN_DIR})
install(TARGETS sd35-onnxruntime LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/sd35)

# The plug-in for TensorRT 10.6 to 11: built for the major version of its headers; the library is
# opened at run time.

find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} PATH_SUFFIXES include)
if(NOT TENSORRT_INCLUDE_DIR OR NOT TARGET sd35-cuda)
  message(STATUS "Not built: libsd35-tensorrt.so; TensorRT's or CUDA's headers are missing "
                 "(give -DTENSORRT_ROOT=DIR)")
  return()
endif()

file(GLOB tensorrt_sources CONFIGURE_DEPENDS backends/tensorrt/*.cpp)
add_library(sd35-tensorrt MODULE ${tensorrt_sources} src/text.cpp)
target_include_directories(sd35-tensorrt PRIVATE include src)
target_include_directories(sd35-tensorrt SYSTEM PRIVATE
  ${TENSORRT_INCLUDE_DIR} ${SD35_CUDA_INCLUDE_DIR})
target_link_libraries(sd35-tensorrt PRIVATE sd35_flags ${CMAKE_DL_LIBS})
set_target_properties(sd35-tensorrt PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${SD35_PLUGIN_DIR})
install(TARGETS sd35-tensorrt LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/sd35)

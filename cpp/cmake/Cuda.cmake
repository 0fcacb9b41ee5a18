# The plug-in for GPUs. CUDA's runtime is linked into it; the driver is opened at run time.

find_path(SD35_CUDA_INCLUDE_DIR cuda_runtime_api.h
          HINTS ${CUDAToolkit_ROOT} $ENV{CUDA_HOME} /usr/local/cuda
          PATH_SUFFIXES include targets/x86_64-linux/include)
# Of a package of its own in NVIDIA's wheels, which PyTorch does not take.
find_path(SD35_CUDA_CRT_DIR crt/host_defines.h
          HINTS ${SD35_CUDA_INCLUDE_DIR} ${CUDAToolkit_ROOT} $ENV{CUDA_HOME} /usr/local/cuda
          PATH_SUFFIXES include targets/x86_64-linux/include)
find_library(SD35_CUDART cudart_static
             HINTS ${CUDAToolkit_ROOT} $ENV{CUDA_HOME} /usr/local/cuda
             PATH_SUFFIXES lib lib64 targets/x86_64-linux/lib)

if(NOT SD35_CUDA_INCLUDE_DIR OR NOT SD35_CUDA_CRT_DIR OR NOT SD35_CUDART)
  message(STATUS "Not built: libsd35-cuda.so; CUDA's headers or libcudart_static.a are missing "
                 "(install the CUDA toolkit, or give -DCUDAToolkit_ROOT=DIR)")
  return()
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS backends/cuda/*.cpp)
add_library(sd35-cuda MODULE ${cuda_sources} src/text.cpp)
target_include_directories(sd35-cuda PRIVATE include src)
target_include_directories(sd35-cuda SYSTEM PRIVATE ${SD35_CUDA_INCLUDE_DIR} ${SD35_CUDA_CRT_DIR})
target_link_libraries(sd35-cuda PRIVATE
  sd35_flags ${SD35_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
target_link_options(sd35-cuda PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(sd35-cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${SD35_PLUGIN_DIR})
install(TARGETS sd35-cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/sd35)

# Finds torch and makes imported targets from its include and lib folders.
#
# Torch's own package config is not used: for a CUDA build of torch, which is what `pip install
# torch` gives most people, it stops with an error where there is no CUDA toolkit, asks for NVRTC,
# probes for a GPU and appends architecture flags to CMAKE_CUDA_FLAGS. Nobody needs any of this to
# link against torch. This file serves the build of the package and, installed beside its config,
# everybody who calls find_package(TorchSelfAttn).
#
#   torch_selfattn_find_torch([GLOBAL] [QUIET] [HINTS <prefix>...])
#
# looks in this order:
#   1. targets of an earlier find_package(Torch) in the same project: they are used as they are
#   2. Torch_DIR, Torch_ROOT (as variable or in the environment)
#   3. CMAKE_PREFIX_PATH (as variable or in the environment): torch's folder, its share/cmake, the
#      folder it lies in (site-packages), or the prefix of an environment
#   4. HINTS
#   5. the Python interpreter: Python_EXECUTABLE, Python3_EXECUTABLE, else python3 in PATH
#
# A folder counts as torch if it is laid out as in a wheel or a libtorch archive. Sets in the
# caller's scope TORCH_SELFATTN_TORCH_ERROR (empty on success), and
#   TORCH_SELFATTN_TORCH_PREFIX      the folder that has include/ and lib/
#   TORCH_SELFATTN_TORCH_VERSION     e.g. 2.14.1, from its headers
#   TORCH_SELFATTN_TORCH_CUDA        major version of CUDA it was built with; empty for a CPU build
#   TORCH_SELFATTN_TORCH_LIB_DIRS    folders of torch's and CUDA's libraries, for an RPATH
# and makes
#   TorchSelfAttn::libtorch          what every user of torch links: torch, torch_cpu, c10
#   TorchSelfAttn::libtorch_cuda     torch_cuda and c10_cuda, if torch has CUDA
include_guard(GLOBAL)

# The version as torch's headers state it, or "" if `include_dir` holds no torch.
function(_torch_selfattn_read_version include_dir out)
  set(${out} "" PARENT_SCOPE)
  foreach(header torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(EXISTS "${include_dir}/${header}")
      file(STRINGS "${include_dir}/${header}" lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH)")
      if(lines MATCHES "MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+)")
        set(${out} "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
endfunction()

# Full path of a library of torch, or "".
function(_torch_selfattn_library prefix name out)
  set(${out} "" PARENT_SCOPE)
  foreach(folder lib lib64)
    set(file "${prefix}/${folder}/${CMAKE_SHARED_LIBRARY_PREFIX}${name}${CMAKE_SHARED_LIBRARY_SUFFIX}")
    if(EXISTS "${file}")
      set(${out} "${file}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# The folder where a Python interpreter would find torch. torch is not imported: that takes seconds.
function(_torch_selfattn_ask_python out)
  set(${out} "" PARENT_SCOPE)
  foreach(python IN ITEMS "${Python_EXECUTABLE}" "${Python3_EXECUTABLE}" python3)
    if(python)
      execute_process(
        COMMAND "${python}" -c
                "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
        OUTPUT_VARIABLE answer OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
      if(status EQUAL 0)
        set(${out} "${answer}" PARENT_SCOPE)
      endif()
      return()  # the first interpreter that is named decides
    endif()
  endforeach()
endfunction()

function(_torch_selfattn_find_prefix hints out)
  set(candidates)
  foreach(dir IN ITEMS "${Torch_DIR}" "$ENV{Torch_DIR}")
    if(dir)
      list(APPEND candidates "${dir}/../../..")
    endif()
  endforeach()
  list(APPEND candidates ${Torch_ROOT} $ENV{Torch_ROOT})
  set(environment_prefixes "$ENV{CMAKE_PREFIX_PATH}")
  string(REPLACE ":" ";" environment_prefixes "${environment_prefixes}")
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH environment_prefixes)
    file(GLOB in_environment "${prefix}/lib/python3.*/site-packages/torch")
    list(APPEND candidates "${prefix}" "${prefix}/../.." "${prefix}/torch" ${in_environment})
  endforeach()
  list(APPEND candidates ${hints} "<ask python>")

  foreach(candidate IN LISTS candidates)
    if(candidate STREQUAL "<ask python>")
      _torch_selfattn_ask_python(candidate)
    endif()
    if(candidate)
      _torch_selfattn_read_version("${candidate}/include" version)
      _torch_selfattn_library("${candidate}" torch_cpu library)
      if(version AND library)
        get_filename_component(candidate "${candidate}" ABSOLUTE)
        set(${out} "${candidate}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
  set(${out} "" PARENT_SCOPE)
endfunction()

function(torch_selfattn_find_torch)
  cmake_parse_arguments(PARSE_ARGV 0 arg "GLOBAL;QUIET" "" "HINTS")
  set(scope)
  if(arg_GLOBAL)
    set(scope GLOBAL)
  endif()
  set(TORCH_SELFATTN_TORCH_ERROR "" PARENT_SCOPE)

  # Where it is.
  set(foreign_targets FALSE)
  if(TARGET torch AND TARGET torch_cpu AND TARGET c10)
    set(foreign_targets TRUE)
    get_target_property(include_dirs torch INTERFACE_INCLUDE_DIRECTORIES)
    list(GET include_dirs 0 include_dir)
    get_filename_component(prefix "${include_dir}/.." ABSOLUTE)
  else()
    _torch_selfattn_find_prefix("${arg_HINTS}" prefix)
  endif()
  if(NOT prefix)
    set(TORCH_SELFATTN_TORCH_ERROR
        "torch was not found. Set Torch_DIR, add torch's folder to CMAKE_PREFIX_PATH, or set Python_EXECUTABLE to an interpreter that has it."
        PARENT_SCOPE)
    return()
  endif()

  # What it is.
  _torch_selfattn_read_version("${prefix}/include" version)
  _torch_selfattn_library("${prefix}" c10 c10)
  _torch_selfattn_library("${prefix}" torch torch)
  _torch_selfattn_library("${prefix}" torch_cpu torch_cpu)
  _torch_selfattn_library("${prefix}" c10_cuda c10_cuda)
  _torch_selfattn_library("${prefix}" torch_cuda torch_cuda)
  set(cuda "")
  get_filename_component(lib_dirs "${torch_cpu}" DIRECTORY)
  if(c10_cuda AND torch_cuda)
    # The runtime it was linked with; a libtorch archive has a hash in the name.
    file(STRINGS "${c10_cuda}" runtime REGEX "^libcudart[-0-9a-f]*\\.so\\.[0-9]+" LIMIT_COUNT 1)
    if(runtime MATCHES "\\.so\\.([0-9]+)")
      set(cuda "${CMAKE_MATCH_1}")
    endif()
    # Wheels take CUDA's libraries from their neighbours in site-packages.
    foreach(neighbour "cu${cuda}" cuda_runtime)
      get_filename_component(dir "${prefix}/../nvidia/${neighbour}/lib" ABSOLUTE)
      if(IS_DIRECTORY "${dir}")
        list(APPEND lib_dirs "${dir}")
      endif()
    endforeach()
  endif()

  if(NOT TARGET TorchSelfAttn::libtorch)
    add_library(TorchSelfAttn::libtorch INTERFACE IMPORTED ${scope})
    if(foreign_targets)
      set_target_properties(TorchSelfAttn::libtorch PROPERTIES INTERFACE_LINK_LIBRARIES "torch;c10")
    else()
      foreach(name c10 torch_cpu)
        add_library(TorchSelfAttn::${name} SHARED IMPORTED ${scope})
        set_target_properties(TorchSelfAttn::${name} PROPERTIES IMPORTED_LOCATION "${${name}}")
      endforeach()
      # libtorch.so is an empty library that needs the others. No symbol of it is ever used, and a
      # linker that defaults to --as-needed would drop it, and CUDA's operators with it.
      set(whole_torch "${torch}")
      if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
        set(whole_torch "-Wl,--push-state,--no-as-needed,${torch},--pop-state")
      endif()
      set_target_properties(
        TorchSelfAttn::libtorch
        PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                   "${prefix}/include;${prefix}/include/torch/csrc/api/include"
                   INTERFACE_LINK_LIBRARIES
                   "TorchSelfAttn::torch_cpu;TorchSelfAttn::c10;${whole_torch}")
      # Its std::string ABI, from the mangled names.
      file(STRINGS "${c10}" new_abi REGEX "NSt7__cxx1112basic_string" LIMIT_COUNT 1)
      set(abi 0)
      if(new_abi)
        set(abi 1)
      endif()
      set_target_properties(TorchSelfAttn::libtorch
                            PROPERTIES INTERFACE_COMPILE_DEFINITIONS "_GLIBCXX_USE_CXX11_ABI=${abi}")
    endif()
    if(cuda)
      foreach(name c10_cuda torch_cuda)
        add_library(TorchSelfAttn::${name} SHARED IMPORTED ${scope})
        set_target_properties(TorchSelfAttn::${name} PROPERTIES IMPORTED_LOCATION "${${name}}")
      endforeach()
      add_library(TorchSelfAttn::libtorch_cuda INTERFACE IMPORTED ${scope})
      set_target_properties(
        TorchSelfAttn::libtorch_cuda
        PROPERTIES INTERFACE_LINK_LIBRARIES
                   "TorchSelfAttn::libtorch;TorchSelfAttn::torch_cuda;TorchSelfAttn::c10_cuda")
      # Some of ATen's CUDA headers include cublas_v2.h and cusparse.h, which a toolkit may lack.
      if(IS_DIRECTORY "${prefix}/../nvidia/cu${cuda}/include")
        get_filename_component(dir "${prefix}/../nvidia/cu${cuda}/include" ABSOLUTE)
        set_target_properties(TorchSelfAttn::libtorch_cuda PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                                                                      "${dir}")
      endif()
    endif()
    if(NOT arg_QUIET)
      set(cuda_text "without CUDA")
      if(cuda)
        set(cuda_text "with CUDA ${cuda}")
      endif()
      message(STATUS "Found torch ${version} ${cuda_text}: ${prefix}")
    endif()
  endif()

  set(TORCH_SELFATTN_TORCH_PREFIX "${prefix}" PARENT_SCOPE)
  set(TORCH_SELFATTN_TORCH_VERSION "${version}" PARENT_SCOPE)
  set(TORCH_SELFATTN_TORCH_CUDA "${cuda}" PARENT_SCOPE)
  set(TORCH_SELFATTN_TORCH_LIB_DIRS "${lib_dirs}" PARENT_SCOPE)
endfunction()

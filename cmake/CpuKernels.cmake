# add_cpu_kernels(<target> <source>...)
#
# An OBJECT library of CPU kernels in which the name of a source says which instruction set it is
# compiled for: *_avx2.cpp, *_avx512.cpp, …; any other source is for the baseline of the platform.
# Such a file is a wrapper of a few lines: it opens a namespace of its own and includes the one
# generic source. It must be reached only after a test of the CPU at run time. Where the platform
# has no such instructions the file is left out, so the list of implementations refers to it under
# `#if defined(__x86_64__)`.
#
# The order at the link matters. An inline function of a shared header that is not in the wrapper's
# namespace may be emitted by several objects, and the linker keeps the first copy. The wrappers are
# in an archive, which the linker reads after all objects, and there the smallest instruction set
# comes first: so no copy with AVX-512 instructions ever stands in for one that an older CPU runs.
set(TORCH_SELFATTN_ISAS avx2 avx512 avx512bf16 amx)
set(TORCH_SELFATTN_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(TORCH_SELFATTN_FLAGS_avx512 ${TORCH_SELFATTN_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl
                                -mavx512dq)
set(TORCH_SELFATTN_FLAGS_avx512bf16 ${TORCH_SELFATTN_FLAGS_avx512} -mavx512bf16)
set(TORCH_SELFATTN_FLAGS_amx ${TORCH_SELFATTN_FLAGS_avx512bf16} -mamx-tile -mamx-bf16)

function(add_cpu_kernels target)
  set(sources ${ARGN})
  set(isa_sources)
  foreach(isa IN LISTS TORCH_SELFATTN_ISAS)
    set(these ${sources})
    list(FILTER these INCLUDE REGEX "_${isa}\\.cpp$")
    if(these)
      list(REMOVE_ITEM sources ${these})
      if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
        set_source_files_properties(${these} PROPERTIES COMPILE_OPTIONS
                                                        "${TORCH_SELFATTN_FLAGS_${isa}}")
        list(APPEND isa_sources ${these})
      endif()
    endif()
  endforeach()
  add_library(${target} OBJECT ${sources})
  if(isa_sources)
    add_library(${target}_isa STATIC ${isa_sources})
    target_link_libraries(${target} INTERFACE ${target}_isa)
    # What is asked of the one holds for the other.
    foreach(property INCLUDE_DIRECTORIES COMPILE_FEATURES)
      set_target_properties(${target}_isa PROPERTIES ${property}
                                                     "$<TARGET_PROPERTY:${target},${property}>")
    endforeach()
  endif()
endfunction()

dnl SPDX-License-Identifier: Apache-2.0
dnl
dnl FQ_CHECK_CUDA
dnl
dnl --with-cuda=auto|yes|no|DIR and --with-cuda-arch=LIST.  Sets NVCC, CUDA_ARCH_FLAGS,
dnl CUDA_CPPFLAGS, CUDA_LIBS (the static runtime: the binary runs with and without a
dnl driver), HAVE_CUDA (config.h and conditional) and cuda_summary.
dnl
dnl An entry of LIST is a compute capability (80, 90a): machine code for it.  PTX of the
dnl highest entry that newer devices can run (one without a letter) is added.
AC_DEFUN([FQ_CHECK_CUDA], [
AC_ARG_WITH([cuda],
    [AS_HELP_STRING([--with-cuda=auto|yes|no|DIR],
        [the CUDA backend; DIR holds bin/nvcc (default: auto)])],
    [], [with_cuda=auto])
AC_ARG_WITH([cuda-arch],
    [AS_HELP_STRING([--with-cuda-arch=LIST],
        [compute capabilities, comma separated (default: 80,86,89,90a and PTX for newer ones)])],
    [], [with_cuda_arch=80,86,89,90a])

have_cuda=no
cuda_summary=no
AS_CASE([$with_cuda],
    [no], [],
    [auto|yes],
        [AC_PATH_PROG([NVCC], [nvcc], [],
            [$PATH$PATH_SEPARATOR${CUDA_HOME:-/usr/local/cuda}/bin$PATH_SEPARATOR/usr/local/cuda/bin])],
    [AC_PATH_PROG([NVCC], [nvcc], [], [$with_cuda/bin])])
AS_IF([test -n "$NVCC"], [
    cuda_root=`dirname "$NVCC"`/..
    cuda_root=`cd "$cuda_root" && pwd -P`
    for cuda_libdir in "$cuda_root/lib64" "$cuda_root/lib" \
        "$cuda_root/targets/x86_64-linux/lib" /usr/lib/x86_64-linux-gnu /usr/lib64; do
        AS_IF([test -f "$cuda_libdir/libcudart_static.a"], [break])
        cuda_libdir=
    done
    AS_IF([test -n "$cuda_libdir"], [have_cuda=yes],
        [AC_MSG_WARN([$NVCC is there but libcudart_static.a is not])])
])
AS_IF([test $have_cuda = no && test "$with_cuda" != no && test "$with_cuda" != auto],
    [AC_MSG_ERROR([--with-cuda=$with_cuda: no usable nvcc and libcudart_static.a found])])
AS_IF([test $have_cuda = no && test "$with_cuda" = auto],
    [cuda_summary='no (no nvcc found; --with-cuda=DIR names a toolkit)'])

AS_IF([test $have_cuda = yes], [
    AC_MSG_CHECKING([that nvcc compiles for every architecture of $with_cuda_arch])
    CUDA_ARCH_FLAGS=
    cuda_ptx=
    for arch in `echo "$with_cuda_arch" | tr , ' '`; do
        CUDA_ARCH_FLAGS="$CUDA_ARCH_FLAGS -gencode=arch=compute_$arch,code=sm_$arch"
        AS_CASE([$arch], [*[[a-z]]], [], [cuda_ptx=$arch])
    done
    AS_IF([test -n "$cuda_ptx"],
        [CUDA_ARCH_FLAGS="$CUDA_ARCH_FLAGS -gencode=arch=compute_$cuda_ptx,code=compute_$cuda_ptx"])
    cat >conftest.cu <<'CONFTEST'
__global__ void probe(int *out) { *out = 1; }
CONFTEST
    AS_IF([$NVCC $CUDA_ARCH_FLAGS -c -o conftest.cuo conftest.cu >conftest.log 2>&1],
        [AC_MSG_RESULT([yes])],
        [AC_MSG_RESULT([no])
         cat conftest.log >&AS_MESSAGE_LOG_FD
         AC_MSG_ERROR([$NVCC rejects --with-cuda-arch=$with_cuda_arch: see config.log])])
    rm -f conftest.cu conftest.cuo conftest.log
    CUDA_CPPFLAGS="-isystem $cuda_root/include"
    CUDA_LIBS="-L$cuda_libdir -lcudart_static -lpthread -ldl -lrt"
    AC_DEFINE([HAVE_CUDA], [1], [The CUDA backend is built])
    cuda_summary="$NVCC, for $with_cuda_arch"
])
AM_CONDITIONAL([HAVE_CUDA], [test $have_cuda = yes])
AC_SUBST([NVCC])
AC_ARG_VAR([NVCCFLAGS], [flags of nvcc (default: -O3)])
AS_IF([test -z "$NVCCFLAGS"], [NVCCFLAGS=-O3])
AC_SUBST([CUDA_ARCH_FLAGS])
AC_SUBST([CUDA_CPPFLAGS])
AC_SUBST([CUDA_LIBS])
])

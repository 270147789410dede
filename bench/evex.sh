#!/bin/sh
# Compiles like g++, and writes instructions of AVX-VNNI in the encoding of AVX-512 VNNI: with the same operands, for a
# processor that has only the latter. The last two arguments are -o and the file to write.
case "$*" in *--version*) exec g++ --version ;; esac
left=$#
for argument; do
    shift
    left=$((left - 1))
    [ $left -ge 2 ] && set -- "$@" "$argument"
done
text="$argument.s"
g++ "$@" -S -o "$text" && sed -i 's/{vex}[[:space:]]*//' "$text" && g++ -shared -pthread "$text" -o "$argument"
status=$?
rm -f "$text"
exit $status

#!/bin/sh
# Prints the version of a package: version.sh DESCRIBE EPOCH, the words of `git describe --match 'v[0-9]*'` and the time of the commit. dpkg and
# rpm order them as they were made, also before the first tag:
#
#   0.0.0~git20261126014240.e9a0690 < 1.0.0~rc1 < 1.0.0~rc1+3.gc0ffee0 < 1.0.0 < 1.0.0+5.gc0ffee0 < 1.0.1
set -eu
case $1 in
v[0-9]*)
    # v1.2.3-rc1-5-gc0ffee0-dirty: the commits since the tag first, then what stands before the release.
    printf '%s\n' "$1" | sed -E 's/^v//; s/-dirty$/+0.dirty/; s/-([0-9]+)-(g[0-9a-f]+)/+\1.\2/; s/\+([^+]*)\+0\.dirty$/+\1.dirty/; s/-/~/; s/-/./g'
    ;;
*) printf '0.0.0~git%s.%s\n' "$(date -u -d "@$2" +%Y%m%d%H%M%S)" "$(printf '%s' "$1" | tr -c 'a-zA-Z0-9' .)" ;;
esac

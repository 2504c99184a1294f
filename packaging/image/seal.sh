#!/bin/sh
# On the machine that an image is made of, after everything else has run: closes the volumes that it may have, and takes off what is this
# machine's. Arguments are those of `luks-kms-agent seal-image`.
set -eu

luks-kms-agent lock
luks-kms-agent seal-image "$@"

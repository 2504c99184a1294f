#!/bin/sh
# After an erase ($1 = 0) or an upgrade (1). rpm has no purge: records, logs, open volumes and the links of `systemctl enable` stay, as they
# do after dpkg's remove.
set -e
if [ "$1" = 0 ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi

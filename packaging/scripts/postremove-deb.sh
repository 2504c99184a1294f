#!/bin/sh
# After a remove: records, logs, configuration, open volumes and the links of `systemctl enable` stay. After a purge: the configuration and the
# links are gone, and records, logs and what waits to be sent of other logs are under another name. No key record is ever deleted: it may be what is left of a volume's key.
set -e
state=/var/lib/luks-kms-agent
logs=/var/log/luks-kms-agent
spool=/var/spool/luks-kms-agent

# keep DIR WHEN WHAT: DIR gets a name that says when it was purged, if there is anything in it but the agent's lock.
keep() {
    if [ -h "$1" ] || [ ! -d "$1" ]; then
        return 0
    fi
    if [ -z "$(find "$1" ! -type d ! -path "$1/lock" -print -quit)" ]; then
        # rmdir takes what is empty, and nothing else.
        rm -f "$1/lock"
        find "$1" -depth -type d -exec rmdir --ignore-fail-on-non-empty {} +
        return 0
    fi
    to=$1.purged-$2 n=1
    while [ -e "$to" ] || [ -h "$to" ]; do
        n=$((n + 1)) to=$1.purged-$2-$n
    done
    if mv -T "$1" "$to"; then # within one folder: a rename
        chmod 0700 "$to"
        echo "luks-kms-agent: the $3 are not deleted, they are now in $to"
    else
        echo "luks-kms-agent: the $3 are not deleted, they are still in $1" >&2
    fi
}

case $1 in
purge)
    now=$(date -u +%Y%m%dT%H%M%SZ)
    keep "$state" "$now" "key records"
    keep "$logs" "$now" "logs"
    # Where nothing waits, nobody needs to know how far was read.
    if [ ! -h "$spool" ] && [ -z "$(find "$spool/spool" -type f -print -quit 2>/dev/null)" ]; then
        rm -f "$spool/positions.json" "$spool/positions.json.tmp"
    fi
    keep "$spool" "$now" "logs that were not sent"
    # Only links of ours that lead nowhere.
    find /etc/systemd/system -name 'luks-kms-agent*' -type l ! -exec test -e {} ';' -delete 2>/dev/null || true
    ;;
remove) ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi

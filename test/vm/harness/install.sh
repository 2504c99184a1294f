#!/bin/sh
# The first process of the boot that installs the agent on the stories' boot disk: it lets dpkg do so, enables the service, says
# "installed" on the console, and powers off. No systemd runs, as where an image is made in a chroot.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
# image.sh keeps man pages and documents out; the stories look at those of ours.
dpkg --path-include=/usr/share/man/man8 --path-include='/usr/share/man/man8/luks-kms-agent*' --path-include='/usr/share/doc/luks-kms-agent*' \
    -i /usr/local/lib/story/luks-kms-agent.deb &&
    systemctl enable luks-kms-agent.service && rm /usr/local/lib/story/install && echo installed
mount -o remount,ro /
systemctl poweroff -ff

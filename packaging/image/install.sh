#!/bin/sh
# On the machine that an image is made of: puts luks-kms-agent and its configuration in place, to start with the next boot.
# Nothing is started, and no disk is touched.
#
#   install.sh CONFIG [PACKAGE]
#
# PACKAGE is a .deb or .rpm; without it the agent has to be there already. PREFLIGHT=yes in the environment: checks role, KMS key and
# machine too, for which the machine needs the role of the nodes.
set -eu

config=$1 package=${2:-}

case $package in
'') ;;
*.deb)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y "$(readlink -f "$package")"
    ;;
*.rpm) dnf install -q -y "$package" ;;
*)
    echo "install.sh: $package is neither a .deb nor a .rpm" >&2
    exit 2
    ;;
esac

install -d -m 0755 /etc/luks-kms-agent
install -m 0640 "$config" /etc/luks-kms-agent/config.yaml
systemctl daemon-reload
systemctl enable luks-kms-agent.service
if [ "${PREFLIGHT:-no}" = yes ]; then
    luks-kms-agent preflight
fi

# Everything a developer does here. Each target installs what it needs (Debian, Ubuntu; root or sudo).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help build lint test-unit test-vm test test-s3-real demo session bench bench-baseline bench-compare bench-archive fleet fuzz soak protections update-golden licenses man install package package-check clean

GO      ?= go
DESTDIR ?=
CACHE   ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/luks-kms-agent
VERSION ?= $(shell git describe --tags --match 'v[0-9]*' --always --dirty 2>/dev/null || echo unknown)
# The time of everything that is made to be shipped, so that two builds of a commit are the same.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

BINARY    := bin/luks-kms-agent
MAX_BYTES := 15000000
# Not part of ./..., because its folder begins with a dot.
TALLY := ./.ci/tally

# Where the distribution has it: the tests with the build tag of that name check the Packer template by it. Elsewhere they do not exist.
PACKER := $(shell . /etc/os-release 2>/dev/null && [ "$$VERSION_CODENAME" = bookworm ] && echo packer)

# Recipes that install packages: $(call need,PACKAGE…). Nothing is asked of apt where all are there.
define need
missing=; for p in $(1); do \
  dpkg-query -W -f '$${Status}\n' "$$p" 2>/dev/null | grep -q ' installed$$' || missing="$$missing $$p"; done; \
if [ -n "$$missing" ]; then \
  command -v apt-get >/dev/null || { echo "install the equivalents of:$$missing" >&2; exit 1; }; \
  echo "installing:$$missing"; \
  $(SUDO) apt-get -qq -o DPkg::Lock::Timeout=300 update; \
  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $$missing; \
fi
endef

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r t d; do printf '  make %-14s %s\n' "$$t" "$$d"; done

build: ## build bin/luks-kms-agent: static, stripped, at most 15 MB
	@CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o $(BINARY) ./cmd/luks-kms-agent
	@size=$$(stat -c %s $(BINARY)); \
	if [ "$$size" -gt $(MAX_BYTES) ]; then echo "$(BINARY) has $$size bytes, more than $(MAX_BYTES)" >&2; exit 1; fi; \
	echo "$(BINARY) $(VERSION), $$size bytes"

lint: ## gofmt, go vet, staticcheck, depguard (who may import whom), shellcheck
	@$(call need,shellcheck)
	@mkdir -p $(CACHE)/tools
	@$(GO) build -C test/tools -buildvcs=false -o $(CACHE)/tools/staticcheck honnef.co/go/tools/cmd/staticcheck
	@$(GO) build -C test/tools -buildvcs=false -o $(CACHE)/tools/depguard github.com/OpenPeeDeeP/depguard/v2/cmd/depguard
	@bad=$$(gofmt -l .); if [ -n "$$bad" ]; then echo "gofmt would change:"; echo "$$bad"; exit 1; fi
	@$(GO) vet -tags 'vm soak packer s3real' ./... $(TALLY)
	@$(CACHE)/tools/staticcheck -tags 'vm soak packer s3real' ./... $(TALLY)
	@$(CACHE)/tools/depguard ./...
	@find . -name '*.sh' -not -path './.git/*' -print0 | xargs -0 shellcheck .ci/run
	@echo "lint: OK"

# S3 servers for the tests, never linked or shipped (MinIO is under the AGPL). $(call s3server,PROGRAM,MODULE@VERSION): builds it, once.
VERSITYGW := github.com/versity/versitygw/cmd/versitygw@v1.8.0
MINIO     := github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c
define s3server
to=$(CACHE)/tools/s3; mkdir -p $$to; \
[ "$$(cat $$to/$(1).version 2>/dev/null)" = $(2) ] || { GOBIN=$$to $(GO) install $(2) && echo $(2) >$$to/$(1).version; }
endef

test-unit: ## unit tests: no root, no VM, no AWS
	@$(call need,cryptsetup-bin dmsetup util-linux fdisk e2fsprogs xfsprogs systemd logrotate groff-base mandoc bash-completion zsh fish dpkg rpm $(PACKER))
	@ls -d $(CACHE)/boot-units-* >/dev/null 2>&1 || $(SUDO) apt-get -qq -o DPkg::Lock::Timeout=300 update
	@$(call s3server,versitygw,$(VERSITYGW))
	@{ rc=0; $(GO) test -json -count=1 -timeout 10m $(if $(PACKER),-tags $(PACKER)) ./... $(TALLY) || rc=1; \
	  $(GO) test -json -count=1 -timeout 5m -tags s3real -run '^TestVersityGateway$$' ./archive -versitygw $(CACHE)/tools/s3/versitygw || rc=1; \
	  $(GO) test -C test/tools -json -count=1 -timeout 5m ./... || rc=1; exit $$rc; } \
	  | $(GO) run $(TALLY) $(if $(COUNTS),-to $(COUNTS))

test-vm: ## the stories, in QEMU with EC2's disks, IMDS and a KMS (VM_ACCEL=kvm: with hardware virtualisation)
	@$(GO) test -json -v -count=1 -timeout 80m -tags vm -parallel 3 ./test/vm | $(GO) run $(TALLY) -live $(if $(COUNTS),-to $(COUNTS))

# All parts run, also after one has failed. A part that fails before it could count counts as one failed test.
test: ## lint, unit tests and VM stories; the last line counts the tests
	@counts=$$(mktemp -d); trap 'rm -rf "$$counts"' EXIT; rc=0; \
	$(MAKE) lint || { rc=1; echo 0 1 0 >"$$counts/lint"; }; \
	for part in test-unit test-vm; do \
	  $(MAKE) $$part COUNTS="$$counts/$$part" || { rc=1; [ -s "$$counts/$$part" ] || echo 0 1 0 >"$$counts/$$part"; }; \
	done; \
	$(GO) run $(TALLY) "$$counts"/* || rc=1; \
	exit $$rc

test-s3-real: ## the client of S3 against servers that are not ours: versitygw, and MinIO (10 minutes to build, once)
	@$(call s3server,versitygw,$(VERSITYGW))
	@$(call s3server,minio,$(MINIO))
	@$(GO) test -v -count=1 -timeout 10m -tags s3real -run '^(TestVersityGateway|TestMinIO)$$' ./archive -versitygw $(CACHE)/tools/s3/versitygw -minio $(CACHE)/tools/s3/minio

demo: ## the main job, told as it goes, in a VM on this machine
	@$(GO) run ./test/vm/demo

session: ## run the session of docs/operations.md in a VM, and write what it printed into it
	@$(GO) run ./test/vm/session

VOLUMES ?= 1,2,4,8,16,24
ROUNDS  ?= 5
BENCH   := docs/benchmarks
bench: ## measure the agent beside what a user would pick, in a VM; writes docs/benchmarks.md and what it shows (an hour)
	@mkdir -p $(BENCH) $(CACHE)/tools
	@$(GO) build -C test/tools -buildvcs=false -o $(CACHE)/tools/report ./report
	@$(GO) run ./test/vm/bench -volumes $(VOLUMES) -repeat $(ROUNDS) -out $(BENCH)/results.csv -io $(BENCH)/io.csv -machine $(BENCH)/machine.txt
	@$(CACHE)/tools/report -results $(BENCH) -page docs/benchmarks.md

GOBENCH = $(GO) test -run '^$$' -bench . -benchmem -count $(1) ./agent ./keycache ./luks ./systemd ./volumes
bench-baseline: ## Go benchmarks; what they say is what bench-compare compares with
	@$(call need,cryptsetup-bin util-linux)
	@mkdir -p $(BENCH)
	@$(call GOBENCH,6) | tee $(BENCH)/go.txt

bench-compare: ## Go benchmarks beside those of the baseline, by benchstat
	@$(call need,cryptsetup-bin util-linux)
	@mkdir -p $(CACHE)/tools
	@$(GO) build -C test/tools -buildvcs=false -o $(CACHE)/tools/benchstat golang.org/x/perf/cmd/benchstat
	@now=$$(mktemp); trap 'rm -f "$$now"' EXIT; $(call GOBENCH,6) >"$$now"; $(CACHE)/tools/benchstat $(BENCH)/go.txt "$$now"

bench-archive: build ## logs archive beside gzip and an upload, its memory, and an escrow of 24 volumes; writes docs/benchmarks-archive.md (10 minutes)
	@$(call need,cryptsetup-bin util-linux e2fsprogs gzip)
	@$(GO) run ./test/bench/archive -agent $(BINARY)

fleet: ## boot 100 and 1,000 nodes at once against a KMS with a quota: docs/benchmarks-fleet.md (5 minutes)
	@$(GO) run ./test/bench/fleet -nodes 100,1000

FUZZTIME ?= 30s
# -fuzzminimizetime 1x: by default Go spends up to a minute on making an input smaller that is only new.
# "context deadline exceeded" without a failing input is a race of Go's when FUZZTIME is over (golang/go#75804, mended in 1.27).
fuzz: ## run each fuzz test for FUZZTIME (30s); ends with a table, and fails if any failed
	@$(call need,cryptsetup-bin util-linux)
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; rc=0; \
	for p in $$($(GO) list ./...); do \
	  $(GO) test -list '^Fuzz' "$$p" >"$$dir/list" || { cat "$$dir/list"; rc=1; continue; }; \
	  for f in $$(grep '^Fuzz' "$$dir/list" || true); do \
	    echo "$$p $$f"; findings=none; \
	    $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x "$$p" 2>&1 | tee "$$dir/log" || \
	      if grep -q 'Failing input' "$$dir/log" || ! grep -q '^    context deadline exceeded$$' "$$dir/log"; then findings=FAILED; rc=1; fi; \
	    execs=$$(sed -n 's/.*execs: \([0-9]*\).*/\1/p' "$$dir/log" | tail -n 1); \
	    printf '%-24s %12s  %s\n' "$$f" "$${execs:-0}" "$$findings" >>"$$dir/table"; \
	  done; \
	done; \
	printf '\n%-24s %12s  %s\n' target executions findings; cat "$$dir/table"; \
	exit $$rc

CUTS ?= 50
soak: ## cut the power CUTS (50) times at random moments, in VMs, and rotate and rewrap as often; ends with tables, and fails if anything was lost
	@$(call need,cryptsetup-bin util-linux)
	@$(GO) test -v -count=1 -timeout 1h -run '^TestKilledAtRandomMoments$$' ./agent -kills $(CUTS)
	@$(GO) test -v -count=1 -timeout 12h -tags 'vm soak' -parallel 2 -run '^TestSoak' ./test/vm -processors 2 -cuts $(CUTS)

protections: ## take away what protects data, one thing at a time, and see its test fail (about 20 minutes; with VM=-vm the stories too)
	@$(call need,cryptsetup-bin dmsetup util-linux fdisk e2fsprogs xfsprogs systemd)
	@$(GO) run ./test/protections $(VM) $(if $(ONLY),-only '$(ONLY)')

update-golden: ## write the expected output of the command line's tests anew
	@$(GO) test -count=1 -run '^(TestScripts|TestCompletion|TestHelp|TestTables|TestScreens)$$' ./cmd/luks-kms-agent -update

licenses: ## write the licences and notices of what is linked in to packaging/licenses, and refuse what is not allowed
	@$(GO) run -C test/tools ./licenses -root ../..

# Made by a program for this machine, also where the one that is installed is for another.
man: ## write the man pages and shell completions to build/
	@rm -rf build/man build/completions && mkdir -p build/completions
	@GOOS= GOARCH= CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o build/for-man ./cmd/luks-kms-agent
	@SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) build/for-man man build/man
	@for shell in bash zsh fish; do build/for-man completion $$shell >build/completions/$$shell; done

ZSH_COMPLETIONS ?= /usr/share/zsh/vendor-completions
DOC := /usr/share/doc/luks-kms-agent
# $(call copy,DIR,TO): all files below DIR, where there is one, under TO.
copy = [ ! -d $(1) ] || (cd $(1) && find . -type f -exec install -D -m 0644 {} $(abspath $(DESTDIR))$(2)/{} ';')
# What this puts under DESTDIR is what the packages have.
install: build man ## install under DESTDIR what the packages have, for developers (enables nothing, overwrites no configuration)
	@install -D -m 0755 $(BINARY) $(DESTDIR)/usr/bin/luks-kms-agent
	@install -D -m 0644 -t $(DESTDIR)/usr/lib/systemd/system $(wildcard systemd/*.service systemd/*.target systemd/*.timer)
	@$(if $(wildcard systemd/*.rules),install -D -m 0644 -t $(DESTDIR)/usr/lib/udev/rules.d $(wildcard systemd/*.rules))
	@install -D -m 0644 -t $(DESTDIR)/usr/lib/tmpfiles.d packaging/tmpfiles.d/luks-kms-agent.conf
	@install -D -m 0644 -t $(DESTDIR)/etc/cloud/cloud.cfg.d packaging/90_luks-kms-agent.cfg
	@install -D -m 0644 -t $(DESTDIR)/etc/logrotate.d packaging/logrotate/luks-kms-agent
	@[ -e $(DESTDIR)/etc/luks-kms-agent/config.yaml ] || install -D -m 0640 -t $(DESTDIR)/etc/luks-kms-agent packaging/config.yaml
	@install -D -m 0644 -t $(DESTDIR)$(DOC) LICENSE NOTICE README.md CHANGELOG.md packaging/copyright packaging/prometheus/alerts.yaml
	@$(call copy,packaging/policies,$(DOC)/policies)
	@$(call copy,packaging/drop-ins,$(DOC)/drop-ins)
	@$(call copy,packaging/licenses,$(DOC)/licenses)
	@install -D -m 0644 -t $(DESTDIR)/usr/share/man/man8 build/man/*.8
	@gzip -9nf $(addprefix $(DESTDIR)/usr/share/man/man8/,luks-kms-agent.8 luks-kms-agent-*.8)
	@install -D -m 0644 build/completions/bash $(DESTDIR)/usr/share/bash-completion/completions/luks-kms-agent
	@install -D -m 0644 build/completions/zsh $(DESTDIR)$(ZSH_COMPLETIONS)/_luks-kms-agent
	@install -D -m 0644 build/completions/fish $(DESTDIR)/usr/share/fish/vendor_completions.d/luks-kms-agent.fish

ARCHES   ?= amd64 arm64
FORMATS  ?= deb rpm
PACKAGES ?= build/packages
PACKAGE_VERSION := $(if $(filter package,$(MAKECMDGOALS)),$(shell packaging/version.sh '$(VERSION)' $(SOURCE_DATE_EPOCH)))
package: ## deb and rpm for amd64 and arm64, with SBOM and SHA256SUMS, in build/packages (ARCHES, FORMATS, PACKAGES: less of it, elsewhere)
	@rm -rf $(PACKAGES) build/package && mkdir -p $(PACKAGES) $(CACHE)/tools
	@GOOS= GOARCH= $(GO) build -C test/tools/package -trimpath -buildvcs=false -o $(CACHE)/tools/ \
	  github.com/goreleaser/nfpm/v2/cmd/nfpm github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod
	@for arch in $(ARCHES); do \
	  binary=build/package/luks-kms-agent-$$arch; \
	  for format in $(FORMATS); do \
	    zsh=$(ZSH_COMPLETIONS); [ $$format != rpm ] || zsh=/usr/share/zsh/site-functions; \
	    GOOS=linux GOARCH=$$arch $(MAKE) install BINARY=$$binary DESTDIR=build/package/$$arch-$$format ZSH_COMPLETIONS=$$zsh >/dev/null; \
	    TREE=build/package/$$arch-$$format ARCH=$$arch VERSION=$(PACKAGE_VERSION) SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) \
	      $(CACHE)/tools/nfpm package --config packaging/nfpm.yaml --packager $$format --target $(PACKAGES) >/dev/null; \
	  done; \
	  $(CACHE)/tools/cyclonedx-gomod bin -json -noserial -std -version $(PACKAGE_VERSION) $$binary 2>/dev/null | \
	    sed "s/^    \"timestamp\": .*/    \"timestamp\": \"$$(date -u -d @$(SOURCE_DATE_EPOCH) +%Y-%m-%dT%H:%M:%SZ)\",/" \
	    >$(PACKAGES)/luks-kms-agent_$(PACKAGE_VERSION)_$$arch.cdx.json; \
	done
	@cd $(PACKAGES) && sha256sum -- * >SHA256SUMS && cat SHA256SUMS

package-check: ## make all packages twice, elsewhere and at another time: the same bytes, the same files, what the SBOM says
	@$(call need,dpkg rpm)
	@$(GO) test -v -count=1 -run '^TestPackages$$' ./packaging -arches amd64,arm64

clean: ## remove what the targets left here (the cache of images and tools stays in ~/.cache/luks-kms-agent)
	@rm -rf bin build

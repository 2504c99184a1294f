package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../../.."

func TestTheCollectionIsUpToDate(t *testing.T) {
	want, err := collect(root)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(root, "packaging/licenses/THIRD-PARTY-LICENSES"))
	if err != nil || string(got) != string(want) {
		t.Errorf("packaging/licenses/THIRD-PARTY-LICENSES is not what is linked in (%v): run make licenses", err)
	}
	// Notices have to be carried along, and so has the licence of code that lies in another module.
	for _, d := range []string{
		"github.com/aws/aws-sdk-go-v2: NOTICE.txt", "github.com/aws/smithy-go: NOTICE", "github.com/coreos/go-systemd/v22: NOTICE",
		"go.yaml.in/yaml/v3: NOTICE", "github.com/aws/aws-sdk-go-v2: internal/sync/singleflight/LICENSE", "Go: LICENSE",
	} {
		if !strings.Contains(string(want), "\n"+d+"\n") {
			t.Errorf("%s is not there", d)
		}
	}
}

func TestLicencesAreKnown(t *testing.T) {
	apache, err := os.ReadFile(filepath.Join(root, "LICENSE"))
	if err != nil {
		t.Fatal(err)
	}
	const (
		isc = `Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted, provided that the
above copyright notice and this permission notice appear in all copies.

THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF
MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES
WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN
CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.`
		gpl = `This program is free software: you can redistribute it and/or modify it under the terms of the GNU General Public License as published by the
Free Software Foundation, either version 3 of the License, or (at your option) any later version.

This program is distributed in the hope that it will be useful, but WITHOUT ANY WARRANTY; without even the implied warranty of MERCHANTABILITY or
FITNESS FOR A PARTICULAR PURPOSE. See the GNU General Public License for more details.

You should have received a copy of the GNU General Public License along with this program. If not, see <https://www.gnu.org/licenses/>.`
		mpl = `This Source Code Form is subject to the terms of the Mozilla Public License, v. 2.0. If a copy of the MPL was not distributed with this file,
You can obtain one at https://mozilla.org/MPL/2.0/.`
	)
	licence := func(texts ...string) (documents []document) {
		for _, text := range texts {
			documents = append(documents, document{name: "LICENSE", ids: classify([]byte(text))})
		}
		return documents
	}
	for _, c := range []struct {
		what      string
		documents []document
		want      string // the licences, or words of the error
	}{
		{"Apache", licence(string(apache)), "Apache-2.0"},
		{"two", licence(string(apache), isc), "Apache-2.0, ISC"},
		{"GPL", licence(gpl), "GPL-3.0"},
		{"MPL", licence(mpl), "MPL-2.0"},
		{"one good, one not", licence(isc, gpl), "GPL-3.0"},
		{"both in one text", licence(isc + "\n\n" + gpl), "GPL-3.0"},
		{"somebody's own", licence("You may use this, but not on Sundays."), "not known"},
		{"a good one and much else", licence(isc + strings.Repeat("\nYou may not use this on Sundays.", 50)), "not known"},
		{"a notice", []document{{name: "NOTICE", notice: true}}, "no licence"},
		{"nothing", nil, "no licence"},
	} {
		ids, err := judge(c.documents)
		got := strings.Join(ids, ", ")
		if bad := strings.Contains(c.want, "no") || !slices.Contains(allowed, strings.Split(c.want, ", ")[0]); bad {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %q, %v, want the error %q", c.what, got, err, c.want)
			}
		} else if err != nil || got != c.want {
			t.Errorf("%s: %q, %v, want %q", c.what, got, err, c.want)
		}
	}
}

// modulePath is one in the first column of docs/dependencies.md.
var modulePath = regexp.MustCompile(`[a-z0-9-]+(\.[a-z0-9-]+)+/[^\s,|]+`)

func TestDependenciesAreDocumented(t *testing.T) {
	out, err := run(root, nil, "mod", "edit", "-json")
	if err != nil {
		t.Fatal(err)
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs/dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, "|"); len(cells) == 5 && !strings.Contains(line, "---") {
			documented = append(documented, modulePath.FindAllString(cells[1], -1)...)
			if strings.TrimSpace(cells[2]) == "" {
				t.Errorf("no reason: %s", line)
			}
		}
	}
	covers := func(row, module string) bool { return row == module || strings.HasPrefix(module, row+"/") }
	for _, m := range mod.Require {
		if !m.Indirect && !slices.ContainsFunc(documented, func(row string) bool { return covers(row, m.Path) }) {
			t.Errorf("docs/dependencies.md does not tell why %s is there", m.Path)
		}
	}
	for i, row := range documented {
		if slices.Contains(documented[:i], row) {
			t.Errorf("docs/dependencies.md tells twice of %s", row)
		}
		if !slices.ContainsFunc(mod.Require, func(m struct {
			Path     string
			Indirect bool
		},
		) bool {
			return !m.Indirect && covers(row, m.Path)
		}) {
			t.Errorf("docs/dependencies.md tells of %s, which is not there", row)
		}
	}
}

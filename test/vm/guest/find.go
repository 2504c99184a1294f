package main

import (
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/search"
)

// find prints every regular file below the paths that holds one of the needles, and which. Needles are lines of base64 in
// a file; the path "-" is standard input.
func find(needlesFile string, paths []string) error {
	text, err := os.ReadFile(needlesFile)
	if err != nil {
		return err
	}
	var needles [][]byte
	for _, line := range strings.Fields(string(text)) {
		needle, err := base64.StdEncoding.DecodeString(line)
		if err != nil {
			return err
		}
		needles = append(needles, needle)
	}
	look := func(name string, f *os.File) error {
		found, err := search.Find(f, needles)
		if err != nil {
			return fmt.Errorf("cannot search %s: %w", name, err)
		}
		for _, i := range found {
			fmt.Println(i, name)
		}
		return nil
	}
	for _, root := range paths {
		if root == "-" {
			if err := look("standard input", os.Stdin); err != nil {
				return err
			}
			continue
		}
		err := filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() || name == needlesFile {
				return err
			}
			f, err := os.Open(name)
			if os.IsNotExist(err) {
				return nil // a file of /run that came and went
			}
			if err != nil {
				return err
			}
			defer f.Close()
			return look(name, f)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

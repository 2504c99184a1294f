// Package search looks for byte strings in streams of any size: for plaintext on raw disks, and for keys everywhere else.
package search

import (
	"bytes"
	"errors"
	"io"
)

// block is how much is looked at at a time, in bytes.
const block = 4 << 20

// Find returns the indexes of the needles that stand anywhere in r, in the order in which they were found.
func Find(r io.Reader, needles [][]byte) ([]int, error) {
	longest := 1
	for _, needle := range needles {
		if len(needle) == 0 {
			return nil, errors.New("an empty needle is everywhere")
		}
		longest = max(longest, len(needle))
	}
	var found []int
	seen := make([]bool, len(needles))
	buffer := make([]byte, block+longest)
	kept := 0 // bytes of the block before: a needle may lie across
	for {
		read, err := io.ReadFull(r, buffer[kept:])
		end := kept + read
		for i, needle := range needles {
			if !seen[i] && bytes.Contains(buffer[:end], needle) {
				seen[i] = true
				found = append(found, i)
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
		kept = copy(buffer, buffer[end-(longest-1):end])
	}
}

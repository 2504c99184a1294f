package search

import (
	"bytes"
	"slices"
	"testing"
	"testing/iotest"
)

func TestFind(t *testing.T) {
	hay := make([]byte, 3*block+17)
	copy(hay, "first")
	copy(hay[2*block-3:], "across")
	copy(hay[len(hay)-4:], "last")
	needles := [][]byte{[]byte("absent"), []byte("last"), []byte("across"), []byte("first"), {0}}
	for _, start := range []int{0, 1, 5} { // so that "across" lies differently in the blocks
		found, err := Find(iotest.HalfReader(bytes.NewReader(hay[start:])), needles)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(found)
		want := []int{1, 2, 3, 4}
		if start > 0 {
			want = []int{1, 2, 4}
		}
		if !slices.Equal(found, want) {
			t.Errorf("from %d: found %v, want %v", start, found, want)
		}
	}
}

func TestFindAcrossEveryBoundary(t *testing.T) {
	needle := []byte("0123456789")
	for at := block - 12; at < block+24; at++ {
		hay := make([]byte, 2*block)
		copy(hay[at:], needle)
		found, err := Find(bytes.NewReader(hay), [][]byte{needle})
		if err != nil || len(found) != 1 {
			t.Fatalf("at %d: %v, %v", at, found, err)
		}
	}
}

func TestFindRefusesEmptyNeedles(t *testing.T) {
	if _, err := Find(bytes.NewReader(nil), [][]byte{nil}); err == nil {
		t.Error("no error")
	}
}

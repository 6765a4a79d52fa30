// Verifies a log of Corral, its proofs and its checkpoints with Go's own golang.org/x/mod/sumdb, which shares no line
// with Corral. Exits with 0 and says what it found, or with 1 and says why not.
//
//	log_verifier log KEY DIRECTORY                 the checkpoint, the tiles and all entries
//	log_verifier record KEY PROOF ENTRY            a .tlog-proof file, for the entry in a file
//	log_verifier tree KEY OLD NEW PROOF            that a checkpoint continues another, by hashes in base64, one a line
//	log_verifier prove KEY OLD DIRECTORY           the same, by a proof that Go makes of the tiles; prints that proof
package main

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func main() {
	commands := map[string]func(note.Verifier, []string) (string, error){
		"log": checkLog, "record": checkRecord, "tree": checkTree, "prove": proveTree,
	}
	said, err := "", errors.New("no such command")
	if len(os.Args) > 3 && commands[os.Args[1]] != nil {
		var key note.Verifier
		key, err = note.NewVerifier(os.Args[2])
		if err == nil {
			said, err = commands[os.Args[1]](key, os.Args[3:])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(said)
}

// open returns the tree of a checkpoint that the key has signed.
func open(encoded []byte, key note.Verifier) (tree tlog.Tree, err error) {
	opened, err := note.Open(encoded, note.VerifierList(key))
	if err != nil {
		return tree, err
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) < 4 || lines[0] != key.Name() {
		return tree, errors.New("not a checkpoint of this log")
	}
	if tree.N, err = strconv.ParseInt(lines[1], 10, 64); err != nil {
		return tree, err
	}
	tree.Hash, err = tlog.ParseHash(lines[2])
	return tree, err
}

func openFile(path string, key note.Verifier) (tree tlog.Tree, err error) {
	encoded, err := os.ReadFile(path)
	if err != nil {
		return tree, err
	}
	return open(encoded, key)
}

// tiles reads the tiles of C2SP tlog-tiles, whose height is 8, from a directory.
type tiles struct {
	directory string
}

func (r tiles) Height() int { return 8 }

func (r tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func (r tiles) ReadTiles(wanted []tlog.Tile) (data [][]byte, err error) {
	for _, tile := range wanted {
		content, err := r.read(strconv.Itoa(tile.L), tile.N, tile.W)
		if err != nil {
			return nil, err
		}
		if len(content) < tile.W*tlog.HashSize {
			return nil, fmt.Errorf("tile %d of level %d is too short", tile.N, tile.L)
		}
		data = append(data, content[:tile.W*tlog.HashSize])
	}
	return data, nil
}

// read returns a tile, or the full one if the partial one is gone.
func (r tiles) read(level string, number int64, width int) ([]byte, error) {
	path := fmt.Sprintf("%03d", number%1000)
	for number >= 1000 {
		number /= 1000
		path = fmt.Sprintf("x%03d/%s", number%1000, path)
	}
	path = filepath.Join(r.directory, "tile", level, path)
	if width < 256 {
		content, err := os.ReadFile(filepath.Join(path+".p", strconv.Itoa(width)))
		if err == nil {
			return content, nil
		}
	}
	return os.ReadFile(path)
}

func checkLog(key note.Verifier, args []string) (string, error) {
	tree, err := openFile(filepath.Join(args[0], "checkpoint"), key)
	if err != nil {
		return "", err
	}
	reader := tlog.TileHashReader(tree, tiles{args[0]})
	root, err := tlog.TreeHash(tree.N, reader)
	if err != nil {
		return "", err
	}
	if root != tree.Hash {
		return "", errors.New("the tiles have another root")
	}
	for first := int64(0); first < tree.N; first += 256 {
		width := 256
		if tree.N-first < 256 {
			width = int(tree.N - first)
		}
		content, err := tiles{args[0]}.read("entries", first/256, width)
		if err != nil {
			return "", err
		}
		var indexes []int64
		var own []tlog.Hash
		for at := 0; at < width; at++ {
			if len(content) < 2 || len(content)-2 < int(binary.BigEndian.Uint16(content)) {
				return "", fmt.Errorf("entry %d is cut off", first+int64(at))
			}
			end := 2 + int(binary.BigEndian.Uint16(content))
			own = append(own, tlog.RecordHash(content[2:end]))
			indexes = append(indexes, tlog.StoredHashIndex(0, first+int64(at)))
			content = content[end:]
		}
		hashes, err := reader.ReadHashes(indexes)
		if err != nil {
			return "", err
		}
		for at, hash := range hashes {
			if hash != own[at] {
				return "", fmt.Errorf("entry %d is not the one in the tree", first+int64(at))
			}
		}
	}
	return fmt.Sprintf("%d entries", tree.N), nil
}

func checkRecord(key note.Verifier, args []string) (string, error) {
	encoded, err := os.ReadFile(args[0])
	if err != nil {
		return "", err
	}
	entry, err := os.ReadFile(args[1])
	if err != nil {
		return "", err
	}
	head, checkpoint, _ := strings.Cut(string(encoded), "\n\n")
	lines := strings.Split(head, "\n")
	if lines[0] != "c2sp.org/tlog-proof@v1" {
		return "", errors.New("not a proof")
	}
	if strings.HasPrefix(lines[1], "extra ") {
		lines = lines[1:]
	}
	number, err := strconv.ParseInt(strings.TrimPrefix(lines[1], "index "), 10, 64)
	if err != nil {
		return "", err
	}
	proof, err := parseHashes(lines[2:])
	if err != nil {
		return "", err
	}
	tree, err := open([]byte(checkpoint), key)
	if err != nil {
		return "", err
	}
	if err := tlog.CheckRecord(proof, tree.N, tree.Hash, number, tlog.RecordHash(entry)); err != nil {
		return "", err
	}
	return fmt.Sprintf("entry %d of %d", number, tree.N), nil
}

func parseHashes(lines []string) (hashes []tlog.Hash, err error) {
	for _, line := range lines {
		hash, err := tlog.ParseHash(line)
		if err != nil {
			return nil, err
		}
		hashes = append(hashes, hash)
	}
	return hashes, nil
}

func checkTree(key note.Verifier, args []string) (string, error) {
	older, err := openFile(args[0], key)
	if err != nil {
		return "", err
	}
	newer, err := openFile(args[1], key)
	if err != nil {
		return "", err
	}
	content, err := os.ReadFile(args[2])
	if err != nil {
		return "", err
	}
	proof, err := parseHashes(strings.Fields(string(content)))
	if err != nil {
		return "", err
	}
	if err := tlog.CheckTree(proof, newer.N, newer.Hash, older.N, older.Hash); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d continues %d", newer.N, older.N), nil
}

func proveTree(key note.Verifier, args []string) (string, error) {
	older, err := openFile(args[0], key)
	if err != nil {
		return "", err
	}
	newer, err := openFile(filepath.Join(args[1], "checkpoint"), key)
	if err != nil {
		return "", err
	}
	proof, err := tlog.ProveTree(newer.N, older.N, tlog.TileHashReader(newer, tiles{args[1]}))
	if err != nil {
		return "", err
	}
	if err := tlog.CheckTree(proof, newer.N, newer.Hash, older.N, older.Hash); err != nil {
		return "", err
	}
	var lines []string
	for _, hash := range proof {
		lines = append(lines, base64.StdEncoding.EncodeToString(hash[:]))
	}
	return strings.Join(lines, "\n"), nil
}

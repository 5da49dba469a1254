package mooring

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"

	"mooring.dev/mooring/mooringv1"
)

// chunkBytes is how much of a file one message carries; the server takes up to 1 MiB.
const chunkBytes = 256 << 10

// File is something to upload: a photo, or a file of an adapter.
type File struct {
	// Name is shown, and kept with the photo; no directories.
	Name string
	// Open returns the contents from their begin. It is called twice: size and SHA-256 are announced before the
	// bytes.
	Open func() (io.ReadCloser, error)
}

// FileAt is the file at a path; it is read as it is sent.
func FileAt(path string) File {
	return File{filepath.Base(path), func() (io.ReadCloser, error) { return os.Open(path) }}
}

// FileBytes is a file of these bytes.
func FileBytes(name string, data []byte) File {
	return File{name, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }}
}

// FileReader is a file of what a reader still holds. An [io.ReadSeeker] is read twice; anything else is read into
// memory when the upload begins.
func FileReader(name string, reader io.Reader) File {
	if seeker, ok := reader.(io.ReadSeeker); ok {
		start := sync.OnceValues(func() (int64, error) { return seeker.Seek(0, io.SeekCurrent) })
		return File{name, func() (io.ReadCloser, error) {
			from, err := start()
			if err == nil {
				_, err = seeker.Seek(from, io.SeekStart)
			}
			return io.NopCloser(seeker), err
		}}
	}
	read := sync.OnceValues(func() ([]byte, error) { return io.ReadAll(reader) })
	return File{name, func() (io.ReadCloser, error) {
		data, err := read()
		return io.NopCloser(bytes.NewReader(data)), err
	}}
}

// headers reads all files once for what is announced of them; the error names every file that cannot be read.
func headers(files []File) ([]*mooringv1.FileHeader, error) {
	found := make([]*mooringv1.FileHeader, len(files))
	var failures []error
	for i, file := range files {
		header, err := headerOf(file)
		if err != nil {
			failures = append(failures, fmt.Errorf("mooring: file %d (%s): %w", i, file.Name, err))
		}
		found[i] = header
	}
	return found, errors.Join(failures...)
}

func headerOf(file File) (*mooringv1.FileHeader, error) {
	reader, err := file.Open()
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	digest := sha256.New()
	size, err := io.Copy(digest, reader)
	return &mooringv1.FileHeader{Filename: file.Name, SizeBytes: size, Sha256: hexOf(digest)}, err
}

// upload sends the first message, then each file's header and chunks, and returns the answer.
func upload[Request, Response any](
	ctx context.Context,
	open func(context.Context, ...grpc.CallOption) (grpc.ClientStreamingClient[Request, Response], error),
	files []File,
	first *Request,
	header func(*mooringv1.FileHeader) *Request,
	chunk func([]byte) *Request,
) (*Response, error) {
	announced, err := headers(files)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a stream that is given up half-way must not look complete to the server
	stream, err := open(ctx)
	if err != nil {
		return nil, AsError(err)
	}
	err = stream.Send(first)
	for i := 0; err == nil && i < len(files); i++ {
		if err = stream.Send(header(announced[i])); err == nil {
			err = sendContents(files[i], func(data []byte) error { return stream.Send(chunk(data)) })
		}
	}
	// io.EOF says that the server has answered already: with why it takes no more.
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	response, err := stream.CloseAndRecv()
	return response, AsError(err)
}

func sendContents(file File, send func([]byte) error) error {
	reader, err := file.Open()
	if err != nil {
		return fmt.Errorf("mooring: file %s: %w", file.Name, err)
	}
	defer reader.Close()
	for {
		buffer := make([]byte, chunkBytes) // gRPC keeps what was sent for a repeat
		n, err := io.ReadFull(reader, buffer)
		if n > 0 {
			if err := send(buffer[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			return nil
		case err != nil:
			return fmt.Errorf("mooring: file %s: %w", file.Name, err)
		}
	}
}

// contents checks what arrives against what was announced.
type contents struct {
	what   string
	size   int64
	sha256 string

	into   io.Writer
	digest hash.Hash
	got    int64
}

func newContents(what string, size int64, sha256Hex string, into io.Writer) *contents {
	return &contents{what, size, sha256Hex, into, sha256.New(), 0}
}

func (c *contents) Write(data []byte) (int, error) {
	c.digest.Write(data)
	c.got += int64(len(data))
	return c.into.Write(data)
}

func (c *contents) check() error {
	if c.got != c.size || c.sha256 != "" && hexOf(c.digest) != c.sha256 {
		return fmt.Errorf("mooring: %s: what arrived differs from what was announced; try again", c.what)
	}
	return nil
}

func hexOf(digest hash.Hash) string { return hex.EncodeToString(digest.Sum(nil)) }

// download writes the files of a stream of headers and chunks to what create returns for each.
func download(
	next func() (file *mooringv1.FileHeader, chunk []byte, err error),
	create func(*mooringv1.FileHeader) (io.Writer, error),
) error {
	var current *contents
	for {
		file, chunk, err := next()
		if (file != nil || err == io.EOF) && current != nil {
			if err := current.check(); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return AsError(err)
		case file != nil:
			into, err := create(file)
			if err != nil {
				return err
			}
			current = newContents(file.GetFilename(), file.GetSizeBytes(), file.GetSha256(), into)
		case current != nil:
			if _, err := current.Write(chunk); err != nil {
				return fmt.Errorf("mooring: %s: %w", current.what, err)
			}
		}
	}
}

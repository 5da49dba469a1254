package mooring

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"image"
	_ "image/png" // what the server sends
	"io"
	"iter"
	"os"
	"slices"

	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring/mooringv1"
)

// Image is one finished picture.
type Image struct {
	// Index is which image of the request it is, from 0.
	Index int
	// Seed draws this very image again when it is requested alone.
	Seed uint64
	// Width and Height are in pixels.
	Width, Height int
	// MediaType is the encoding of Data, "image/png" today.
	MediaType string
	// Data is the encoded picture.
	Data []byte
}

// Decode returns the picture's pixels.
func (i *Image) Decode() (image.Image, error) {
	picture, _, err := image.Decode(bytes.NewReader(i.Data))
	if err != nil {
		return nil, fmt.Errorf("mooring: image %d: %w", i.Index, err)
	}
	return picture, nil
}

// WriteFile writes the encoded picture to a file as it is, with its provenance mark, which is lost when the picture is
// decoded and encoded anew.
func (i *Image) WriteFile(path string) error { return os.WriteFile(path, i.Data, 0o644) }

// GenerateEvent is one event of a generation: one of its fields is set. An event of a newer server is left out.
type GenerateEvent struct {
	// Queued says that the request waits, and behind how many.
	Queued *mooringv1.GenerateQueued
	// Progress says that a denoising step was done, with previews when they were asked for.
	Progress *mooringv1.GenerateProgress
	// Image is a finished picture.
	Image *Image
	// Done says that everything was sent, and with what it was drawn.
	Done *mooringv1.GenerateDone
}

// Generate draws images and iterates over everything that happens on the way; [Client.Images] gives the pictures
// alone. The same request gives the same images.
//
// A server that is lost in the middle is an error with UNAVAILABLE: what was sent so far is good, and repeating the
// request gives the rest.
func (c *Client) Generate(
	ctx context.Context, request *mooringv1.GenerateRequest,
) iter.Seq2[GenerateEvent, error] {
	return func(yield func(GenerateEvent, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.personalization.Generate(ctx, completed(request))
		if err != nil {
			yield(GenerateEvent{}, AsError(err))
			return
		}
		var assembler assembler
		for {
			message, err := stream.Recv()
			if err == io.EOF {
				return
			}
			event := GenerateEvent{
				Queued: message.GetQueued(), Progress: message.GetProgress(), Done: message.GetDone(),
			}
			if chunk := message.GetImage(); err == nil && chunk != nil {
				event.Image, err = assembler.add(chunk)
			}
			if err != nil {
				yield(GenerateEvent{}, AsError(err))
				return
			}
			if event != (GenerateEvent{}) && !yield(event, nil) {
				return
			}
		}
	}
}

// Images draws images and returns them in the order of their index.
func (c *Client) Images(ctx context.Context, request *mooringv1.GenerateRequest) ([]*Image, error) {
	var images []*Image
	for event, err := range c.Generate(ctx, request) {
		if err != nil {
			return nil, err
		}
		if event.Image != nil {
			images = append(images, event.Image)
		}
	}
	slices.SortFunc(images, func(a, b *Image) int { return cmp.Compare(a.Index, b.Index) })
	return images, nil
}

// BatchEvent is a part of the answer to one request of [Client.GenerateBatch]: images, then Done; or Err, alone or
// after some images.
type BatchEvent struct {
	// ID is the request's.
	ID string
	// Image is a finished picture.
	Image *Image
	// Done says that the request was answered completely.
	Done *mooringv1.GenerateDone
	// Err says that the request failed; the others go on.
	Err *Error
}

// GenerateBatch draws many requests over one connection. Results come as they finish, in any order, under the
// caller's ids, which maps.All gives of a map.
//
// The requests are iterated over in a goroutine of their own, as fast as the server takes them: any number of them
// can be given, and few are in memory. It leaves that iterator when the batch ends, at its next request at the
// latest. The iterator's error is that of the whole call; requests without Done or Err are to be sent again.
func (c *Client) GenerateBatch(
	ctx context.Context, requests iter.Seq2[string, *mooringv1.GenerateRequest],
) iter.Seq2[BatchEvent, error] {
	return func(yield func(BatchEvent, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.personalization.GenerateBatch(ctx)
		if err != nil {
			yield(BatchEvent{}, AsError(err))
			return
		}
		go func() {
			for id, request := range requests {
				message := &mooringv1.GenerateBatchRequest{Id: id, Request: completed(request)}
				if ctx.Err() != nil || stream.Send(message) != nil {
					return // why is what Recv returns
				}
			}
			_ = stream.CloseSend() // it always returns nil
		}()
		assemblers := map[string]*assembler{}
		for {
			message, err := stream.Recv()
			if err == io.EOF {
				return
			}
			event := BatchEvent{ID: message.GetId(), Done: message.GetDone()}
			if chunk := message.GetImage(); chunk != nil {
				if assemblers[event.ID] == nil {
					assemblers[event.ID] = new(assembler)
				}
				event.Image, err = assemblers[event.ID].add(chunk)
			} else {
				delete(assemblers, event.ID)
			}
			if failed := message.GetError(); failed != nil {
				event.Err = FromStatus(failed)
			}
			if err != nil {
				yield(BatchEvent{}, AsError(err))
				return
			}
			if (event.Image != nil || event.Done != nil || event.Err != nil) && !yield(event, nil) {
				return
			}
		}
	}
}

// completed is a copy of a request with whole names.
func completed(request *mooringv1.GenerateRequest) *mooringv1.GenerateRequest {
	request = proto.CloneOf(request)
	request.Adapter = resourceName("adapters", request.GetAdapter())
	for _, use := range request.GetMoreAdapters() {
		use.Adapter = resourceName("adapters", use.GetAdapter())
	}
	return request
}

// assembler puts the chunks of the images of one request together; images are not interleaved.
type assembler struct{ parts bytes.Buffer }

// add takes one chunk and returns the image where that completes it.
func (a *assembler) add(chunk *mooringv1.ImageChunk) (*Image, error) {
	what := fmt.Sprintf("image %d", chunk.GetIndex())
	if chunk.GetOffset() != int64(a.parts.Len()) {
		return nil, fmt.Errorf("mooring: %s: bytes %d to %d are missing", what, a.parts.Len(), chunk.GetOffset())
	}
	a.parts.Write(chunk.GetData())
	if !chunk.GetLast() {
		return nil, nil
	}
	data := bytes.Clone(a.parts.Bytes())
	a.parts.Reset()
	checked := newContents(what, chunk.GetSizeBytes(), chunk.GetSha256(), io.Discard)
	if _, err := checked.Write(data); err != nil {
		return nil, err
	}
	if err := checked.check(); err != nil {
		return nil, err
	}
	return &Image{
		Index:     int(chunk.GetIndex()),
		Seed:      chunk.GetSeed(),
		Width:     int(chunk.GetWidth()),
		Height:    int(chunk.GetHeight()),
		MediaType: chunk.GetMediaType(),
		Data:      data,
	}, nil
}

package mooring

import (
	"bytes"
	"context"
	"io"
	"iter"
	"slices"

	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring/mooringv1"
)

// AdapterView says which adapter versions are shown.
type AdapterView int

// ShowDeleted shows what is left of deleted versions too; they have a DeleteTime.
const ShowDeleted AdapterView = 1

// Adapter returns one adapter version with its certificate; without "@version" the newest that is not deleted.
func (c *Client) Adapter(ctx context.Context, adapter string, view ...AdapterView) (*mooringv1.Adapter, error) {
	request := &mooringv1.GetAdapterRequest{
		Name: resourceName("adapters", adapter), ShowDeleted: slices.Contains(view, ShowDeleted),
	}
	response, err := unary(ctx, c, c.adapters.GetAdapter, request)
	return response.GetAdapter(), err
}

// Adapters iterates over all adapter versions, newest first, without their certificates' layers.
func (c *Client) Adapters(ctx context.Context, view ...AdapterView) iter.Seq2[*mooringv1.Adapter, error] {
	return pages(func(token string) ([]*mooringv1.Adapter, string, error) {
		request := &mooringv1.ListAdaptersRequest{PageToken: token, ShowDeleted: slices.Contains(view, ShowDeleted)}
		page, err := unary(ctx, c, c.adapters.ListAdapters, request)
		return page.GetAdapters(), page.GetNextPageToken(), err
	})
}

// DeleteAdapter deletes one version ("rex@2"), or all versions of an adapter ("rex").
func (c *Client) DeleteAdapter(ctx context.Context, adapter string) error {
	request := &mooringv1.DeleteAdapterRequest{Name: resourceName("adapters", adapter)}
	_, err := unary(ctx, c, c.adapters.DeleteAdapter, request)
	return err
}

// ExportAdapter returns an adapter version as files, by their names.
func (c *Client) ExportAdapter(
	ctx context.Context, adapter string, format mooringv1.AdapterFormat,
) (map[string][]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.adapters.ExportAdapter(
		ctx, &mooringv1.ExportAdapterRequest{Name: resourceName("adapters", adapter), Format: format},
	)
	if err != nil {
		return nil, AsError(err)
	}
	buffers := map[string]*bytes.Buffer{}
	err = download(
		func() (*mooringv1.FileHeader, []byte, error) {
			message, err := stream.Recv()
			return message.GetFile(), message.GetChunk(), err
		},
		func(file *mooringv1.FileHeader) (io.Writer, error) {
			buffers[file.GetFilename()] = new(bytes.Buffer)
			return buffers[file.GetFilename()], nil
		},
	)
	if err != nil {
		return nil, err
	}
	files := make(map[string][]byte, len(buffers))
	for name, buffer := range buffers {
		files[name] = buffer.Bytes()
	}
	return files, nil
}

// ImportAdapter publishes an adapter that another tool made (diffusers, PEFT with its adapter_config.json, kohya,
// learned embeddings) as the next version of adapter.AdapterId. What does not fit the server's base is refused by
// name, and nothing is stored.
func (c *Client) ImportAdapter(
	ctx context.Context, adapter *mooringv1.AdapterImport, files ...File,
) (*mooringv1.Adapter, error) {
	adapter = proto.CloneOf(adapter)
	adapter.RequestId = orNewID(adapter.GetRequestId())
	response, err := upload(
		ctx, c.adapters.ImportAdapter, files,
		&mooringv1.ImportAdapterRequest{Content: &mooringv1.ImportAdapterRequest_Adapter{Adapter: adapter}},
		func(header *mooringv1.FileHeader) *mooringv1.ImportAdapterRequest {
			return &mooringv1.ImportAdapterRequest{Content: &mooringv1.ImportAdapterRequest_File{File: header}}
		},
		func(data []byte) *mooringv1.ImportAdapterRequest {
			return &mooringv1.ImportAdapterRequest{Content: &mooringv1.ImportAdapterRequest_Chunk{Chunk: data}}
		},
	)
	return response.GetAdapter(), err
}

package mooring

import (
	"bytes"
	"context"
	"io"
	"iter"

	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring/mooringv1"
)

// RunBatch starts a batch job from a file of rows: JSON Lines, an object a line with "prompt" and whatever else
// [mooringv1.GenerateRequest] has, one image a row. Every row is checked before the job is queued; the caller need
// not stay. [Client.BatchRows] brings the images. The settings may be nil.
func (c *Client) RunBatch(
	ctx context.Context, settings *mooringv1.BatchSettings, rows File,
) (*mooringv1.Job, error) {
	begin := &mooringv1.BatchSettings{}
	proto.Merge(begin, settings)
	begin.RequestId = orNewID(begin.GetRequestId())
	response, err := upload(
		ctx, c.personalization.RunBatch, []File{rows},
		&mooringv1.RunBatchRequest{Content: &mooringv1.RunBatchRequest_Settings{Settings: begin}},
		func(header *mooringv1.FileHeader) *mooringv1.RunBatchRequest {
			return &mooringv1.RunBatchRequest{Content: &mooringv1.RunBatchRequest_File{File: header}}
		},
		func(data []byte) *mooringv1.RunBatchRequest {
			return &mooringv1.RunBatchRequest{Content: &mooringv1.RunBatchRequest_Chunk{Chunk: data}}
		},
	)
	return response.GetJob(), err
}

// BatchRow is a row of a batch job that is done.
type BatchRow struct {
	// Row says which one, and its line of the manifest; without a filename the row ended with an error.
	Row *mooringv1.BatchRow
	// Image is the encoded picture; nil where the row ended with an error.
	Image []byte
}

// BatchRows iterates over the rows of a batch job in the order in which they get done, those with a position larger
// than after, 0 for all. It follows a job that still runs and ends with it; a connection that breaks is taken up
// again after the last whole row, over a restart of the server too.
func (c *Client) BatchRows(ctx context.Context, job string, after int32) iter.Seq2[BatchRow, error] {
	return func(yield func(BatchRow, error) bool) {
		request := &mooringv1.DownloadBatchRequest{Name: resourceName("jobs", job), AfterPosition: after}
		resume := c.newResume()
		for {
			left, err := c.batchRowsOnce(ctx, request, func(row BatchRow) bool {
				resume.heard()
				return yield(row, nil)
			})
			if left || err == nil {
				return
			}
			if err := resume.after(ctx, err); err != nil {
				yield(BatchRow{}, err)
				return
			}
		}
	}
}

// batchRowsOnce follows one stream and moves request.AfterPosition along. It returns whether the caller has left, and
// the error that the stream ended with, nil at the job's end.
func (c *Client) batchRowsOnce(
	ctx context.Context, request *mooringv1.DownloadBatchRequest, take func(BatchRow) bool,
) (left bool, _ error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.jobs.DownloadBatch(ctx, proto.CloneOf(request))
	if err != nil {
		return false, AsError(err)
	}
	var row *mooringv1.BatchRow
	var image bytes.Buffer
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			return false, nil
		}
		if err != nil {
			return false, AsError(err)
		}
		if message.GetRow() != nil {
			row = message.GetRow()
			image.Reset()
		}
		image.Write(message.GetChunk())
		if row == nil || int64(image.Len()) < row.GetSizeBytes() {
			continue
		}
		done := BatchRow{Row: row}
		if row.GetFilename() != "" {
			done.Image = bytes.Clone(image.Bytes())
			checked := newContents(row.GetFilename(), row.GetSizeBytes(), row.GetSha256(), io.Discard)
			if _, err := checked.Write(done.Image); err != nil {
				return false, err
			}
			if err := checked.check(); err != nil {
				return false, err
			}
		}
		request.AfterPosition, row = row.GetPosition(), nil
		if !take(done) {
			return true, nil
		}
	}
}

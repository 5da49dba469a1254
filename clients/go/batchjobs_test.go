package mooring_test

import (
	"bytes"
	"image/png"
	"reflect"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

func TestARealServersBatchJobs(t *testing.T) {
	_, client := real(t)
	rows := "{\"prompt\": \"a dog\", \"steps\": 2}\n\n{\"prompt\": \"a cat\", \"steps\": 2, \"seed\": 7}\n"
	settings := &mooringv1.BatchSettings{RequestId: "5a0d6b0e-7a0c-4c43-9a0b-6a7f2f3c1d10"}
	job, err := client.RunBatch(t.Context(), settings, mooring.FileBytes("rows.jsonl", []byte(rows)))
	if err != nil {
		t.Fatal(err)
	}
	again, err := client.RunBatch(t.Context(), settings, mooring.FileBytes("rows.jsonl", []byte(rows)))
	if err != nil || again.GetName() != job.GetName() {
		t.Error("the same request is another job:", again, err)
	}
	images := map[int32][]byte{}
	var position int32
	for row, err := range client.BatchRows(t.Context(), job.GetName(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		images[row.Row.GetRow()] = row.Image
		position = row.Row.GetPosition()
	}
	alone, err := client.Images(t.Context(), &mooringv1.GenerateRequest{
		Prompt: "a cat", Steps: proto.Int32(2), Seed: proto.Uint64(7),
	})
	if err != nil {
		t.Fatal(err)
	}
	wanted, err := alone[0].Decode()
	if err != nil {
		t.Fatal(err)
	}
	// the files differ by their provenance marks
	drawn, err := png.Decode(bytes.NewReader(images[3]))
	if err != nil || len(images) != 2 || images[1] == nil || !reflect.DeepEqual(drawn, wanted) {
		t.Errorf("%d images, and row 3 is not the image that Generate gives: %v", len(images), err)
	}
	for row, err := range client.BatchRows(t.Context(), job.GetName(), position) {
		t.Error("after the last row came", row, err)
	}
	if job, err = client.Wait(t.Context(), job.GetName(), nil); err != nil || job.GetBatchResult().GetImageCount() != 2 {
		t.Error(job, err)
	}
	_, err = client.RunBatch(t.Context(), nil, mooring.FileBytes("rows.jsonl", []byte("{\"prompt\": \"\"}\n")))
	if status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

package mooring_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

func TestAGenerationIsRepeatedBeforeItsFirstEventOnly(t *testing.T) {
	away := failure(codes.Unavailable, "Gone.", info("DRAINING", nil))
	for _, begun := range []bool{false, true} {
		s := &scripted{}
		s.generate = func(
			_ *mooringv1.GenerateRequest, stream grpc.ServerStreamingServer[mooringv1.GenerateResponse],
		) error {
			if s.count() > 0 {
				return stream.Send(doneMessage())
			}
			if begun {
				if err := stream.Send(progressMessage(1)); err != nil {
					return err
				}
			}
			return away
		}
		var events int
		var failed error
		for event, err := range serve(t, s).Generate(t.Context(), &mooringv1.GenerateRequest{Prompt: "a dog"}) {
			if err != nil {
				failed = err
			} else if event.Progress != nil || event.Done != nil {
				events++
			}
		}
		calls := len(s.times())
		if !begun && (calls != 2 || failed != nil || events != 1) {
			t.Errorf("before: %d calls, %d events, %v", calls, events, failed)
		}
		if begun && (calls != 1 || status.Code(failed) != codes.Unavailable || events != 1) {
			t.Errorf("after: %d calls, %d events, %v", calls, events, failed)
		}
	}
}

// -- streams ------------------------------------------------------------------------------------------------------

func progressMessage(step int32) *mooringv1.GenerateResponse {
	return &mooringv1.GenerateResponse{Event: &mooringv1.GenerateResponse_Progress{
		Progress: &mooringv1.GenerateProgress{Step: step, Steps: 10},
	}}
}

func doneMessage() *mooringv1.GenerateResponse {
	return &mooringv1.GenerateResponse{Event: &mooringv1.GenerateResponse_Done{
		Done: &mooringv1.GenerateDone{Images: 1},
	}}
}

func chunks(index int32, data []byte, piece int) []*mooringv1.ImageChunk {
	digest := sha256.Sum256(data)
	var found []*mooringv1.ImageChunk
	for start := 0; start < len(data); start += piece {
		end := min(start+piece, len(data))
		found = append(found, &mooringv1.ImageChunk{
			Index: index, Seed: uint64(index) + 7, MediaType: "image/png", Width: 8, Height: 8,
			SizeBytes: int64(len(data)), Sha256: hex.EncodeToString(digest[:]),
			Offset: int64(start), Data: data[start:end], Last: end == len(data),
		})
	}
	return found
}

func TestImagesArePutTogetherChecked(t *testing.T) {
	first, second := bytes.Repeat([]byte("a"), 700), bytes.Repeat([]byte("b"), 300)
	send := chunks(1, second, 128)
	send = append(send, chunks(0, first, 256)...)
	s := &scripted{generate: func(
		_ *mooringv1.GenerateRequest, stream grpc.ServerStreamingServer[mooringv1.GenerateResponse],
	) error {
		for _, chunk := range send {
			message := &mooringv1.GenerateResponse{Event: &mooringv1.GenerateResponse_Image{Image: chunk}}
			if err := stream.Send(message); err != nil {
				return err
			}
		}
		return nil
	}}
	client := serve(t, s)
	images, err := client.Images(t.Context(), &mooringv1.GenerateRequest{Prompt: "a dog"})
	if err != nil {
		t.Fatal(err)
	}
	if len(images) != 2 || !bytes.Equal(images[0].Data, first) || !bytes.Equal(images[1].Data, second) ||
		images[1].Seed != 8 {
		t.Fatal(images)
	}
	for name, spoil := range map[string]func(){
		"missing bytes": func() { send = slices.Delete(slices.Clone(send), 1, 2) },
		"other bytes": func() {
			send[0] = proto.CloneOf(send[0])
			send[0].Data = bytes.Repeat([]byte("c"), len(send[0].GetData()))
		},
	} {
		kept := slices.Clone(send)
		spoil()
		if _, err := client.Images(t.Context(), &mooringv1.GenerateRequest{Prompt: "a dog"}); err == nil {
			t.Errorf("%s: no error", name)
		}
		send = kept
	}
}

func TestLeavingTheLoopCancelsTheCall(t *testing.T) {
	gone := make(chan struct{})
	s := &scripted{generate: func(
		_ *mooringv1.GenerateRequest, stream grpc.ServerStreamingServer[mooringv1.GenerateResponse],
	) error {
		defer close(gone)
		for step := int32(1); stream.Send(progressMessage(step)) == nil; step++ {
			select {
			case <-stream.Context().Done():
				return nil
			case <-time.After(10 * time.Millisecond):
			}
		}
		return nil
	}}
	for _, err := range serve(t, s).Generate(t.Context(), &mooringv1.GenerateRequest{Prompt: "a dog"}) {
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	<-gone
}

func TestABatchFlowsBothWays(t *testing.T) {
	s := &scripted{batch: func(
		stream grpc.BidiStreamingServer[mooringv1.GenerateBatchRequest, mooringv1.GenerateBatchResponse],
	) error {
		for {
			request, err := stream.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			response := &mooringv1.GenerateBatchResponse{Id: request.GetId()}
			if request.GetRequest().GetPrompt() == "" {
				failed := failure(codes.InvalidArgument, "Empty.", info("EMPTY_PROMPT", nil))
				response.Result = &mooringv1.GenerateBatchResponse_Error{Error: status.Convert(failed).Proto()}
				if err := stream.Send(response); err != nil {
					return err
				}
				continue
			}
			for _, chunk := range chunks(0, []byte(request.GetRequest().GetAdapter()), 4) {
				image := &mooringv1.GenerateBatchResponse{
					Id: request.GetId(), Result: &mooringv1.GenerateBatchResponse_Image{Image: chunk},
				}
				if err := stream.Send(image); err != nil {
					return err
				}
			}
			response.Result = &mooringv1.GenerateBatchResponse_Done{Done: &mooringv1.GenerateDone{Images: 1}}
			if err := stream.Send(response); err != nil {
				return err
			}
		}
	}}
	client := serve(t, s)
	given := 0
	requests := func(yield func(string, *mooringv1.GenerateRequest) bool) {
		for i := range 500 {
			given++
			request := &mooringv1.GenerateRequest{Prompt: "a dog", Adapter: "rex"}
			if i == 250 {
				request.Prompt = ""
			}
			if !yield(string(rune('a'+i%26))+strings.Repeat("x", i/26), request) {
				return
			}
		}
	}
	var images, done, failed int
	for event, err := range client.GenerateBatch(t.Context(), requests) {
		switch {
		case err != nil:
			t.Fatal(err)
		case event.Image != nil:
			images++
			if string(event.Image.Data) != "tenants/-/adapters/rex" {
				t.Fatal(string(event.Image.Data))
			}
		case event.Done != nil:
			done++
		case event.Err != nil:
			failed++
			if !event.Err.Has(mooringv1.ErrorReason_ERROR_REASON_EMPTY_PROMPT) {
				t.Error(event.Err)
			}
		}
	}
	if given != 500 || images != 499 || done != 499 || failed != 1 {
		t.Fatal(given, images, done, failed)
	}

	left := make(chan struct{})
	endless := func(yield func(string, *mooringv1.GenerateRequest) bool) {
		defer close(left)
		for yield("same", &mooringv1.GenerateRequest{Prompt: "a dog"}) {
			time.Sleep(time.Millisecond)
		}
	}
	for range client.GenerateBatch(t.Context(), endless) {
		break
	}
	<-left // a batch that is left leaves its requests
}

// -- uploads ------------------------------------------------------------------------------------------------------

func TestUploadsAreAnnouncedAndChunked(t *testing.T) {
	var mu sync.Mutex
	received := map[string]string{}
	s := &scripted{upload: func(
		stream grpc.ClientStreamingServer[mooringv1.UploadPhotosRequest, mooringv1.UploadPhotosResponse],
	) error {
		name, announced := "", map[string]string{}
		for {
			message, err := stream.Recv()
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
			if header := message.GetFile(); header != nil {
				name = header.GetFilename()
				announced[name] = header.GetSha256()
			}
			if len(message.GetChunk()) > 1<<20 {
				return failure(codes.InvalidArgument, "A chunk is too large.")
			}
			mu.Lock()
			received[name] += string(message.GetChunk())
			mu.Unlock()
		}
		for name, want := range announced {
			if got := sha256.Sum256([]byte(received[name])); hex.EncodeToString(got[:]) != want {
				return failure(codes.InvalidArgument, name)
			}
		}
		return stream.SendAndClose(&mooringv1.UploadPhotosResponse{AddedCount: int32(len(announced))})
	}}
	client := serve(t, s)
	big := bytes.Repeat([]byte("0123456789"), 100_000)
	path := filepath.Join(t.TempDir(), "path.jpg")
	if err := os.WriteFile(path, big, 0o600); err != nil {
		t.Fatal(err)
	}
	seeker := bytes.NewReader(big)
	if _, err := seeker.Seek(10, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	response, err := client.UploadPhotos(
		t.Context(), "rex",
		mooring.FileAt(path),
		mooring.FileBytes("bytes.jpg", big[:99]),
		mooring.FileReader("seeker.jpg", seeker),
		mooring.FileReader("stream.jpg", iotest.OneByteReader(bytes.NewReader(big[:5000]))),
	)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]byte{
		"path.jpg": big, "bytes.jpg": big[:99], "seeker.jpg": big[10:], "stream.jpg": big[:5000],
	} {
		if received[name] != string(want) {
			t.Errorf("%s: %d bytes", name, len(received[name]))
		}
	}
	if response.GetAddedCount() != 4 {
		t.Error(response)
	}

	_, err = client.UploadPhotos(t.Context(), "rex", mooring.FileAt(path), mooring.FileAt(path+".not"))
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "file 1") {
		t.Error(err)
	}
}

func TestAnUploadThatIsRefusedEarlySaysWhy(t *testing.T) {
	client := serve(t, &scripted{upload: func(
		stream grpc.ClientStreamingServer[mooringv1.UploadPhotosRequest, mooringv1.UploadPhotosResponse],
	) error {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		return failure(codes.NotFound, "No such subject.", info("SUBJECT_NOT_FOUND", nil))
	}})
	_, err := client.UploadPhotos(t.Context(), "rex", mooring.FileBytes("big.jpg", make([]byte, 8<<20)))
	if !mooring.Has(err, mooringv1.ErrorReason_ERROR_REASON_SUBJECT_NOT_FOUND) {
		t.Fatal(err)
	}
}

// -- pages and watching -------------------------------------------------------------------------------------------

func TestPagesAreFetchedAsTheyAreNeeded(t *testing.T) {
	s := &scripted{}
	s.jobs = func(r *mooringv1.ListJobsRequest) (*mooringv1.ListJobsResponse, error) {
		if r.GetKind() != mooringv1.JobKind_JOB_KIND_TRAIN {
			return nil, failure(codes.InvalidArgument, "kind")
		}
		page := s.count()
		if want := []string{"", "1", "2"}[page]; r.GetPageToken() != want {
			return nil, failure(codes.InvalidArgument, "page_token")
		}
		next := []string{"1", "2", ""}[page]
		return &mooringv1.ListJobsResponse{Jobs: []*mooringv1.Job{{}, {}}, NextPageToken: next}, nil
	}
	client := serve(t, s)
	count := 0
	for _, err := range client.Jobs(t.Context(), mooringv1.JobKind_JOB_KIND_TRAIN, 0) {
		if err != nil {
			t.Fatal(err)
		}
		if count++; count == 3 {
			break
		}
	}
	if calls := len(s.times()); calls != 2 {
		t.Errorf("%d pages for three jobs", calls)
	}
	for _, err := range client.Jobs(t.Context(), 0, 0) {
		if status.Code(err) != codes.InvalidArgument {
			t.Fatal(err)
		}
	}
}

func watched(sequence int64) *mooringv1.WatchJobResponse {
	return &mooringv1.WatchJobResponse{
		Sequence: sequence, Event: &mooringv1.WatchJobResponse_Progress{Progress: &mooringv1.JobProgress{}},
	}
}

func ended(sequence int64, state mooringv1.JobState) *mooringv1.WatchJobResponse {
	job := &mooringv1.Job{Name: "tenants/a/jobs/1", State: state, Adapter: "rex@1"}
	if state == mooringv1.JobState_JOB_STATE_FAILED {
		failed := failure(codes.FailedPrecondition, "The loss became NaN.", info("TRAINING_DIVERGED", nil))
		job.Error = status.Convert(failed).Proto()
	}
	return &mooringv1.WatchJobResponse{Sequence: sequence, Event: &mooringv1.WatchJobResponse_Job{Job: job}}
}

func TestAWatchGoesOnWhereItWas(t *testing.T) {
	var from []int64
	s := &scripted{watch: func(
		r *mooringv1.WatchJobRequest, stream grpc.ServerStreamingServer[mooringv1.WatchJobResponse],
	) error {
		from = append(from, r.GetAfterSequence())
		for sequence := r.GetAfterSequence() + 1; sequence <= 6; sequence++ {
			if err := stream.Send(watched(sequence)); err != nil {
				return err
			}
			switch sequence {
			case 2:
				return failure(codes.Unavailable, "Gone.", info("DRAINING", nil))
			case 4:
				return nil // in good order, but before the job's end
			}
		}
		return stream.Send(ended(6, mooringv1.JobState_JOB_STATE_SUCCEEDED))
	}}
	var sequences []int64
	job, err := serve(t, s).Wait(t.Context(), "1", func(event *mooringv1.WatchJobResponse) {
		sequences = append(sequences, event.GetSequence())
	})
	if err != nil || job.GetAdapter() != "rex@1" {
		t.Fatal(job, err)
	}
	if !slices.Equal(sequences, []int64{1, 2, 3, 4, 5, 6, 6}) || !slices.Equal(from, []int64{0, 2, 4}) {
		t.Error(sequences, from)
	}
}

func TestAWatchEndsWithWhatIsNotWorthResuming(t *testing.T) {
	s := &scripted{}
	s.watch = func(r *mooringv1.WatchJobRequest, stream grpc.ServerStreamingServer[mooringv1.WatchJobResponse]) error {
		s.count()
		if r.GetAfterSequence() == 0 {
			if err := stream.Send(watched(1)); err != nil {
				return err
			}
		}
		return failure(codes.Internal, "Broken.")
	}
	client := serve(t, s)
	if _, err := client.Wait(t.Context(), "1", nil); status.Code(err) != codes.Internal || len(s.times()) != 1 {
		t.Error(err)
	}

	impatient := serve(t, &scripted{watch: func(
		r *mooringv1.WatchJobRequest, stream grpc.ServerStreamingServer[mooringv1.WatchJobResponse],
	) error {
		if r.GetAfterSequence() == 0 {
			return errors.Join(stream.Send(watched(1)), failure(codes.Unavailable, "Gone."))
		}
		return failure(codes.Unavailable, "Gone.")
	}}, mooring.WithPatience(time.Second))
	if _, err := impatient.Wait(t.Context(), "1", nil); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := impatient.Wait(ctx, "1", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestAFailedJobIsAnError(t *testing.T) {
	client := serve(t, &scripted{watch: func(
		_ *mooringv1.WatchJobRequest, stream grpc.ServerStreamingServer[mooringv1.WatchJobResponse],
	) error {
		return stream.Send(ended(1, mooringv1.JobState_JOB_STATE_FAILED))
	}})
	_, err := client.Wait(t.Context(), "1", nil)
	var failed *mooring.JobError
	if !errors.As(err, &failed) || failed.Job.GetName() != "tenants/a/jobs/1" ||
		!mooring.Has(err, mooringv1.ErrorReason_ERROR_REASON_TRAINING_DIVERGED) {
		t.Fatal(err)
	}
	if want := "mooring: job tenants/a/jobs/1 failed: TRAINING_DIVERGED: The loss became NaN."; err.Error() != want {
		t.Error(err)
	}
}

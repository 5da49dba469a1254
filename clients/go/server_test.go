package mooring_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/png"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

// server is the real one: a process of its own on a tiny base, over TLS, with API keys. It can be killed and started
// again on its state.
type server struct {
	target, key string

	folder  string
	process *exec.Cmd
	stdin   io.Closer
}

// start returns when the server takes calls. It takes the port of the last start, so that clients find it again.
func (s *server) start(made authority) error {
	python := os.Getenv("MOORING_TEST_PYTHON")
	if python == "" {
		python = "../../.venv/bin/python"
	}
	if s.target == "" {
		s.target = "127.0.0.1:0"
	}
	log, err := os.OpenFile(filepath.Join(s.folder, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	s.process = exec.Command(python, "../../tests/serve_tiny.py", s.folder, s.target)
	s.process.Env = append(os.Environ(),
		"MOORING_AUTH=api_key", "MOORING_TLS_CERT="+made.server.cert, "MOORING_TLS_KEY="+made.server.key,
		"MOORING_LEASE_SECONDS=3", "MOORING_DRAIN_SECONDS=1",
		"OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false",
	)
	s.process.Stderr = log
	if s.stdin, err = s.process.StdinPipe(); err != nil {
		return err
	}
	stdout, err := s.process.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.process.Start(); err != nil {
		return fmt.Errorf("%w: set MOORING_TEST_PYTHON, or run `make setup`", err)
	}
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("the server did not start: %s", said[max(0, len(said)-4000):])
	}
	var ready struct{ Target, Key string }
	if err := json.Unmarshal(line, &ready); err != nil {
		return err
	}
	s.target = ready.Target
	if s.key == "" {
		s.key = ready.Key
	}
	return nil
}

func (s *server) kill() error {
	err := s.process.Process.Kill()
	_ = s.process.Wait() // says only that it was killed
	return err
}

var started = &server{}

var startOnce = sync.OnceValue(func() error {
	folder, err := os.MkdirTemp("", "mooring-go-server")
	if err != nil {
		return err
	}
	started.folder = folder
	made, err := makeCerts()
	if err != nil {
		return err
	}
	return started.start(made)
})

// real returns the server, started by the first test that asks, and a client of it.
func real(t *testing.T) (*server, *mooring.Client) {
	t.Helper()
	if err := startOnce(); err != nil {
		t.Fatal(err)
	}
	client, err := mooring.New(
		started.target, mooring.WithRootCAFile(certs(t).ca), mooring.WithAPIKey(started.key),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return started, client
}

func TestMain(m *testing.M) {
	code := m.Run()
	if started.process != nil {
		started.stdin.Close()
		_ = started.process.Wait()
	}
	for _, folder := range []string{started.folder, certFolder()} {
		if folder != "" {
			os.RemoveAll(folder)
		}
	}
	os.Exit(code)
}

func certFolder() string {
	made, err := makeCerts()
	if err != nil {
		return ""
	}
	return filepath.Dir(made.ca)
}

func photo(seed uint64) []byte {
	random := rand.New(rand.NewPCG(seed, 0))
	picture := image.NewGray(image.Rect(0, 0, 48, 40))
	for i := range picture.Pix {
		picture.Pix[i] = uint8(random.Uint32())
	}
	var data bytes.Buffer
	if err := png.Encode(&data, picture); err != nil {
		panic(err)
	}
	return data.Bytes()
}

func subject(t *testing.T, client *mooring.Client, id string) *mooringv1.Subject {
	t.Helper()
	made, err := client.CreateSubject(t.Context(), &mooringv1.CreateSubjectRequest{
		SubjectId: id,
		Subject: &mooringv1.Subject{
			ClassNoun: "dog",
			Rights:    &mooringv1.RightsDeclaration{Basis: mooringv1.RightsDeclaration_BASIS_OWNED},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	response, err := client.UploadPhotos(
		t.Context(), id, mooring.FileBytes("0.png", photo(0)), mooring.FileReader("1.png", bytes.NewReader(photo(1))),
	)
	if err != nil {
		t.Fatal(err)
	}
	if response.GetAddedCount() != 2 {
		t.Fatal(response)
	}
	return made
}

func trained(t *testing.T, client *mooring.Client, id string) string {
	t.Helper()
	job, err := client.Train(t.Context(), &mooringv1.TrainRequest{
		Subject: id,
		Config: &mooringv1.TrainingConfig{
			Method: mooringv1.TrainingMethod_TRAINING_METHOD_NONE,
			Steps:  proto.Int32(2), PreviewEvery: proto.Int32(0), Views: proto.Int32(1),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	job, err = client.Wait(t.Context(), job.GetName(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return job.GetAdapter()
}

func TestARealServerKnowsItsCaller(t *testing.T) {
	s, client := real(t)
	info, err := client.ServerInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.GetTenant() != "tenants/tests" {
		t.Error(info.GetTenant())
	}
	stranger, err := mooring.New(
		s.target, mooring.WithRootCAFile(certs(t).ca), mooring.WithAPIKey(s.key[:len(s.key)-1]+"x"),
	)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	_, err = stranger.ServerInfo(t.Context())
	if !mooring.Has(err, mooringv1.ErrorReason_ERROR_REASON_NOT_AUTHENTICATED) {
		t.Error(err)
	}
}

func TestARealServerDrawsAndSaysWhatIsWrong(t *testing.T) {
	_, client := real(t)
	request := &mooringv1.GenerateRequest{
		Prompt: "a photo of a dog", Steps: proto.Int32(3), Count: proto.Int32(2), Seed: proto.Uint64(5),
	}
	var kinds []string
	var images []*mooring.Image
	for event, err := range client.Generate(t.Context(), request) {
		switch {
		case err != nil:
			t.Fatal(err)
		case event.Progress != nil:
			kinds = append(kinds, "progress")
		case event.Image != nil:
			images = append(images, event.Image)
			kinds = append(kinds, "image")
		case event.Done != nil:
			kinds = append(kinds, "done")
		}
	}
	if kinds = slices.Compact(kinds); kinds[0] != "progress" || kinds[len(kinds)-1] != "done" || len(images) != 2 {
		t.Fatal(kinds)
	}
	picture, err := images[0].Decode()
	if err != nil {
		t.Fatal(err)
	}
	if picture.Bounds().Dx() != images[0].Width || images[0].Seed != 5 {
		t.Error(picture.Bounds(), images[0].Seed)
	}
	again, err := client.Images(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	// the files differ by the time in their provenance marks
	if same, err := again[0].Decode(); err != nil || !reflect.DeepEqual(same, picture) {
		t.Error("the same request gave another image", err)
	}

	_, err = client.Images(t.Context(), &mooringv1.GenerateRequest{Prompt: "a dog", Steps: proto.Int32(1000)})
	var failed *mooring.Error
	if !errors.As(err, &failed) || !failed.Has(mooringv1.ErrorReason_ERROR_REASON_STEPS_OUT_OF_RANGE) ||
		failed.Metadata["maximum"] == "" || failed.RequestID == "" {
		t.Errorf("%+v", err)
	}
	_, err = client.UploadPhotos(t.Context(), "nobody", mooring.FileBytes("a.png", photo(0)))
	if !mooring.Has(err, mooringv1.ErrorReason_ERROR_REASON_SUBJECT_NOT_FOUND) {
		t.Error(err)
	}
}

func TestARealServersResources(t *testing.T) {
	_, client := real(t)
	subject(t, client, "resources")
	_, err := client.UploadPhotos(
		t.Context(), "resources", mooring.FileBytes("ok.png", photo(2)), mooring.FileBytes("bad.png", []byte("no")),
	)
	var failed *mooring.Error
	if !errors.As(err, &failed) || len(failed.Fields) != 1 || failed.Fields[0].Field != "files[1]" {
		t.Errorf("%+v", err)
	}
	got, err := client.Subject(t.Context(), "resources")
	if err != nil || got.GetPhotoCount() != 2 {
		t.Error(got, err)
	}

	name := trained(t, client, "resources")
	adapter, err := client.Adapter(t.Context(), "resources")
	if err != nil || adapter.GetName() != name {
		t.Fatal(adapter, err)
	}
	exported, err := client.ExportAdapter(t.Context(), name, mooringv1.AdapterFormat_ADAPTER_FORMAT_NATIVE)
	if err != nil || len(exported) != 1 {
		t.Fatal(err)
	}
	var files []mooring.File
	for filename, data := range exported {
		files = append(files, mooring.FileBytes(filename, data))
	}
	imported, err := client.ImportAdapter(t.Context(), &mooringv1.AdapterImport{
		AdapterId: "copy", Rights: &mooringv1.RightsDeclaration{Basis: mooringv1.RightsDeclaration_BASIS_OWNED},
	}, files...)
	if err != nil || imported.GetDigest() != adapter.GetDigest() {
		t.Error(imported, err)
	}
	if got := names(t, client.Adapters(t.Context())); !slices.Contains(got, name) || !slices.Contains(got, imported.GetName()) {
		t.Error(got)
	}
	if err := client.DeleteAdapter(t.Context(), "copy"); err != nil {
		t.Error(err)
	}
	if _, err := client.Adapter(t.Context(), "copy"); status.Code(err) != codes.NotFound {
		t.Error(err)
	}
	deleted, err := client.Adapter(t.Context(), imported.GetName(), mooring.ShowDeleted)
	if err != nil || deleted.GetDeleteTime() == nil {
		t.Error(deleted, err)
	}
	if got := names(t, client.Adapters(t.Context())); slices.Contains(got, imported.GetName()) {
		t.Error(got)
	}
	if got := names(t, client.Adapters(t.Context(), mooring.ShowDeleted)); !slices.Contains(got, imported.GetName()) {
		t.Error(got)
	}
	if err := client.DeleteSubject(t.Context(), "resources"); err != nil {
		t.Error(err)
	}
	if got := names(t, client.Subjects(t.Context())); slices.Contains(got, "tenants/tests/subjects/resources") {
		t.Error(got)
	}
	jobs := 0
	for job, err := range client.Jobs(
		t.Context(), mooringv1.JobKind_JOB_KIND_TRAIN, mooringv1.JobState_JOB_STATE_SUCCEEDED,
	) {
		if err != nil || !mooring.Terminal(job) {
			t.Fatal(job, err)
		}
		jobs++
	}
	if jobs == 0 {
		t.Error("no job is listed")
	}
	publishing(t, client, name)
	if _, err := client.Evaluate(t.Context(), &mooringv1.EvaluateRequest{Adapter: name}); err == nil {
		t.Error("a server without judges took an evaluation")
	}
}

func publishing(t *testing.T, client *mooring.Client, version string) {
	t.Helper()
	request := &mooringv1.PublishAdapterRequest{Name: version}
	_, err := client.PublishAdapter(t.Context(), request)
	var failed *mooring.Error
	if !errors.As(err, &failed) || failed.Code != codes.FailedPrecondition || !strings.HasPrefix(failed.Reason, "GATE_") {
		t.Fatalf("a version without an evaluation passed the gate: %v", err)
	}
	policy, err := client.UpdateGatePolicy(t.Context(), &mooringv1.UpdateGatePolicyRequest{
		Policy: &mooringv1.GatePolicy{Mode: mooringv1.GateMode_GATE_MODE_OFF},
	})
	if err != nil || policy.GetMode() != mooringv1.GateMode_GATE_MODE_OFF {
		t.Fatal(policy, err)
	}
	if policy, err = client.GatePolicy(t.Context()); err != nil || policy.GetMode() != mooringv1.GateMode_GATE_MODE_OFF {
		t.Error(policy, err)
	}
	published, err := client.PublishAdapter(t.Context(), request)
	if err != nil || published.GetAlias().GetAdapter() != version {
		t.Fatal(published, err)
	}
	if live, err := client.Adapter(t.Context(), "resources@live"); err != nil || live.GetName() != version {
		t.Error(live, err)
	}
	if got := names(t, client.Aliases(t.Context(), "resources")); len(got) != 1 {
		t.Error(got)
	}
	if got := names(t, client.GateDecisions(t.Context(), version)); len(got) == 0 {
		t.Error("no decision was kept")
	}
	_, err = client.RollBackAdapter(t.Context(), &mooringv1.RollBackAdapterRequest{Name: "resources"})
	if !mooring.Has(err, mooringv1.ErrorReason_ERROR_REASON_NOTHING_TO_ROLL_BACK) {
		t.Error(err)
	}
	if err := client.DeleteAlias(t.Context(), "resources@live"); err != nil {
		t.Error(err)
	}
	moves := 0
	for _, err := range client.AliasMoves(t.Context(), "resources") {
		if err != nil {
			t.Fatal(err)
		}
		moves++
	}
	if moves != 2 {
		t.Errorf("%d moves", moves)
	}
}

// names are those of what an iterator gives.
func names[Item interface{ GetName() string }](t *testing.T, items iter.Seq2[Item, error]) []string {
	t.Helper()
	var found []string
	for item, err := range items {
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, item.GetName())
	}
	return found
}

// The server is killed (not stopped) while it trains and draws.
func TestAKilledServer(t *testing.T) {
	s, client := real(t)
	subject(t, client, "killed")
	job, err := client.Train(t.Context(), &mooringv1.TrainRequest{
		Subject: "killed",
		Config: &mooringv1.TrainingConfig{
			Method: mooringv1.TrainingMethod_TRAINING_METHOD_NONE, Steps: proto.Int32(80),
			CheckpointEvery: proto.Int32(5), PreviewEvery: proto.Int32(0), Views: proto.Int32(1),
		},
	})
	if err != nil {
		t.Fatal(err)
	}

	training := make(chan struct{})
	var sequences []int64
	var last *mooringv1.Job
	watched := make(chan error)
	go func() {
		once := sync.OnceFunc(func() { close(training) })
		defer once()
		for event, err := range client.Watch(t.Context(), job.GetName(), 0) {
			if err != nil {
				watched <- err
				return
			}
			if event.GetProgress().GetPhase() == "training" && event.GetProgress().GetStep() >= 10 {
				once()
			}
			sequences, last = append(sequences, event.GetSequence()), event.GetJob()
		}
		watched <- nil
	}()
	<-training

	var drawing error
	kills := 0
	long := &mooringv1.GenerateRequest{Prompt: "a dog", Steps: proto.Int32(150), Count: proto.Int32(8)}
	for event, err := range client.Generate(t.Context(), long) {
		if drawing = err; event.Progress != nil && kills == 0 {
			kills++
			if err := s.kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if kills != 1 || status.Code(drawing) != codes.Unavailable {
		t.Errorf("a generation that was cut off after its first event: %v", drawing)
	}
	if err := s.start(certs(t)); err != nil {
		t.Fatal(err)
	}

	if err := <-watched; err != nil {
		t.Fatal(err)
	}
	if last.GetState() != mooringv1.JobState_JOB_STATE_SUCCEEDED || last.GetAdapter() == "" {
		t.Fatal(last)
	}
	for i, sequence := range sequences[:len(sequences)-1] {
		if sequence != sequences[0]+int64(i) {
			t.Fatalf("event %d has sequence %d: %v", i, sequence, sequences)
		}
	}
	// The same client, on the same key, without being told of the restart.
	images, err := client.Images(t.Context(), &mooringv1.GenerateRequest{Prompt: "a <killed> dog", Adapter: last.GetAdapter()})
	if err != nil || len(images) != 1 {
		t.Error(err)
	}
}

func TestExamples(t *testing.T) {
	s, _ := real(t)
	folder := t.TempDir()
	for i := range 2 {
		if err := os.WriteFile(fmt.Sprintf("%s/photo%d.png", folder, i), photo(uint64(i)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, example := range []struct {
		arguments []string
		stdin     string
		written   []string
	}{
		{
			[]string{"train-and-generate", "-id", "example", "-steps", "3", folder + "/photo0.png", folder + "/photo1.png"},
			"", []string{"example.png"},
		},
		{[]string{"generate", "-adapter", "example", "-seed", "7", "-count", "2", "a <example> dog"}, "", []string{"7.png", "8.png"}},
		{[]string{"batch", "-adapter", "example"}, "a dog\na <example> dog\na red car\n", []string{"1.png", "2.png", "3.png"}},
	} {
		t.Run(example.arguments[0], func(t *testing.T) {
			out := t.TempDir()
			run := exec.CommandContext(t.Context(), "go", append(
				[]string{"run", "./examples/" + example.arguments[0], "-server", s.target, "-out", out},
				example.arguments[1:]...)...)
			run.Env = append(os.Environ(), "MOORING_API_KEY="+s.key, "MOORING_ROOT_CERTIFICATES="+certs(t).ca)
			run.Stdin = strings.NewReader(example.stdin)
			if said, err := run.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, said)
			}
			for _, name := range example.written {
				data, err := os.ReadFile(filepath.Join(out, name))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := png.Decode(bytes.NewReader(data)); err != nil {
					t.Error(name, err)
				}
			}
		})
	}
}

// A module of its own, so that the client's users need not have OpenTelemetry's.
func TestTheTracedExample(t *testing.T) {
	s, _ := real(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan []byte, 16)
	collector := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var spans emptypb.Empty // keeps what it does not know
		if err := stream.RecvMsg(&spans); err != nil {
			return err
		}
		sent <- spans.ProtoReflect().GetUnknown()
		return stream.SendMsg(&emptypb.Empty{})
	}))
	go func() { _ = collector.Serve(listener) }()
	defer collector.Stop()

	out := t.TempDir()
	run := exec.CommandContext(
		t.Context(), "go", "run", "-C", "examples/traced", ".", "-server", s.target, "-out", out, "a dog",
	)
	run.Env = append(os.Environ(), "MOORING_API_KEY="+s.key, "MOORING_ROOT_CERTIFICATES="+certs(t).ca,
		"OTEL_EXPORTER_OTLP_ENDPOINT=http://"+listener.Addr().String())
	if said, err := run.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	if _, err := os.Stat(filepath.Join(out, "drawn.png")); err != nil {
		t.Error(err)
	}
	close(sent) // the program has ended, and had sent them before
	var spans []byte
	for data := range sent {
		spans = append(spans, data...)
	}
	for _, name := range []string{"draw", "mooring.v1.PersonalizationService/Generate"} {
		if !bytes.Contains(spans, []byte(name)) {
			t.Errorf("no span %q was sent", name)
		}
	}
}
